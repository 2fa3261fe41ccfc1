"""What would fail later: one small function a subject, and the table of them.

A check yields a sentence for each fault (thing, found, wanted, way out), or raises the error that the launch would raise.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_pz.config.rules import GAMES, validate
from megatron_pz.corpus.playable import longest, read_texts
from megatron_pz.corpus.tokenizer import HFTokenizer, check_vocab
from megatron_pz.doctor.patient import Patient
from megatron_pz.engine.sglang.fleet import refuse_taken
from megatron_pz.engine.sglang.specs import server_urls
from megatron_pz.engine.sglang.versions import check_version, installed_version
from megatron_pz.errors import CorpusError, EngineError, MegatronPZError

GIB = 1024**3
Check = Callable[[Patient], Iterator[str]]


def settings(patient: Patient) -> Iterator[str]:
    """Rules of the settings, those of the layout included."""
    validate(patient.config, patient.world_size)
    yield from ()


def batch(patient: Patient) -> Iterator[str]:
    """Every update of every data-parallel replica can have a rollout."""
    config, sizes = patient.config, patient.config.parallel
    task = config.task
    model = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    replicas = max(1, patient.world_size // max(1, model))
    per_paragraph = 1
    if task.task == "rlvr":
        per_paragraph = task.n_predictions_per_mask
    elif task.task in GAMES:
        per_paragraph = task.n_masks_per_paragraph * (task.n_predictions_per_mask + (task.task == "pretrain_zero"))
    found, wanted = task.paragraphs_per_step * per_paragraph, replicas * config.train.updates_per_batch
    if found < wanted:
        yield (
            f"A step has at most {found} samples for {replicas} data-parallel replicas x train.updates_per_batch "
            f"{config.train.updates_per_batch} = {wanted}; each needs one. Raise --paragraphs-per-step, or lower --updates-per-batch "
            "or the number of ranks."
        )


def tokenizer(patient: Patient) -> Iterator[str]:
    """The tokenizer can be read and belongs to the model."""
    check_vocab(patient.tokenizer, int(patient.hf_config["vocab_size"]))
    yield from ()


def positions(patient: Patient) -> Iterator[str]:
    """The longest playable prompt leaves room for an answer."""
    limit = int(patient.hf_config.get("max_position_embeddings") or 0)
    if not limit or patient.config.task.task not in GAMES:
        return
    found = len(patient.task.prompt_ids(longest(patient.paragraphs).text))
    if found >= limit:
        yield (
            f"A prompt has {found} tokens and the model's max_position_embeddings is {limit}, which must hold the answer too. "
            "Lower --max-paragraph-tokens or --max-prompt-tokens."
        )


def templates(patient: Patient) -> Iterator[str]:
    """Both templates can be read and have their placeholders."""
    _ = patient.templates
    yield from ()


def chat_template(patient: Patient) -> Iterator[str]:
    """Where prompts are chat turns, the tokenizer can frame one."""
    if patient.config.task.prompt_style == "chat":
        patient.tokenizer.apply_chat("a")
    yield from ()


def stop_tokens(patient: Patient) -> Iterator[str]:
    """What the chat template writes after an answer ends a response. Base checkpoints often do not name it."""
    found = patient.tokenizer
    if patient.config.task.prompt_style != "chat" or not isinstance(found, HFTokenizer) or not found.has_chat_template:
        return
    end = found.after_answer()
    if not end or end[0] not in found.eos_token_ids:
        told = f"{found.decode(end[:1])!r} (id {end[0]})" if end else "nothing"
        yield (
            f"The chat template of {found.name} writes {told} after an answer, and a response ends at ids "
            f"{', '.join(map(str, found.eos_token_ids))}: no turn would end before --max-response-tokens. Name the end in "
            "`eos_token_id` of generation_config.json beside the tokenizer, or use --prompt-style plain."
        )


def corpus(patient: Patient) -> Iterator[str]:
    """The corpus can be read, and a step does not play a paragraph twice."""
    config = patient.config
    try:
        _ = patient.task
    except MegatronPZError:  # told by its own check; the texts' faults are another matter
        for flag, path in (("--data-path", config.corpus.data_path), ("--held-out-path", config.corpus.held_out_path)):
            try:
                if path:
                    read_texts(path, config)
            except CorpusError as error:
                yield f"{flag}: {error}"
        return
    over = config.engine.over_sampling if config.engine.stragglers != "wait" else 0.0
    wanted = -int(-config.task.paragraphs_per_step * (1 + over) // 1)
    if (found := len(patient.paragraphs)) < wanted:
        yield (
            f"{config.corpus.data_path} has {found} paragraphs that can be played, and a step begins {wanted}; one would be "
            "played twice in a step. Lower --paragraphs-per-step or give more text."
        )


def fixed_masks(patient: Patient) -> Iterator[str]:
    """The sets that are scored can be made, of held-out text too."""
    if patient.config.evaluate.eval_interval:
        from megatron_pz.train.fixed_sets import fixed_sets

        fixed_sets(patient.config, patient.tokenizer, patient.templates, patient.paragraphs)
    yield from ()


def memory(patient: Patient) -> Iterator[str]:
    """Layout against model, and memory: the planner's word."""
    for fault in patient.plan.faults:
        yield f"{fault}. tools/plan_layout.py names layouts that fit."


def disk(patient: Patient) -> Iterator[str]:
    """The checkpoints that are to come and folders of weights (`hf/`, those that servers read) have room."""
    from megatron_pz.plan.saves import room  # imports Megatron

    saved, run_dir = patient.plan.saves, Path(patient.config.checkpoint.run_dir).absolute()
    place = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    steps = [int(folder.name.removeprefix("step_")) for folder in patient.saved_steps]
    found, free = room(saved, patient.config, steps), shutil.disk_usage(place).free
    if free < found.wanted_bytes:
        yield (
            f"{run_dir} has {free / GIB:.2f} GiB of free disk, and {found.num_checkpoints} checkpoints of "
            f"{saved.checkpoint_bytes / GIB:.2f} GiB with {found.num_folders} folders of weights (hf/, weights/) of "
            f"{saved.weights_bytes / GIB:.2f} want {found.wanted_bytes / GIB:.2f}. Make room, lower --keep, set --no-export-hf or give "
            "another --run-dir."
        )


def servers(patient: Patient) -> Iterator[str]:
    """The run's own servers have their SGLang and their ports."""
    config, sglang = patient.config, patient.config.sglang
    if config.engine.engine != "sglang" or server_urls(config):
        return
    python = sglang.server_python or sys.executable
    try:
        check_version(installed_version(python), python)
    except EngineError as error:
        yield str(error)
    for port in range(sglang.server_port, sglang.server_port + sglang.num_servers) if sglang.server_port else ():
        try:
            refuse_taken(sglang.server_host, port)
        except EngineError as error:
            yield str(error)


def stale_masters(patient: Patient) -> Iterator[str]:
    """An optimizer on the host copies weights when it is made, which is before a checkpoint is read.

    Shown with Megatron's own optimizer on a CPU (tests/checkpoint/test_host_optimizer.py): its masters stay those of the weights
    at its making, also after `reload_model_params`, so a run that goes on is refused when it reads its checkpoint; weights
    of `--load` and of `hf_model` come before it. Copies of a GPU's masters, and a step, need CUDA and were not run.
    """
    if not patient.config.optimizer.get("optimizer_cpu_offload"):
        return
    if patient.platform == "cpu":
        yield (
            "optimizer.optimizer_cpu_offload is true on the platform cpu, where Megatron's offloading cannot make a step. Leave it out."
        )
    elif patient.saved_steps:
        yield (
            f"optimizer.optimizer_cpu_offload is true and the run goes on from {patient.saved_steps[-1]}: the copies that the "
            "optimizer keeps on the host would be those of the model before it. Leave it out, or begin a new --run-dir with --load."
        )


LIGHT: dict[str, Check] = {
    "settings": settings,
    "batch": batch,
    "templates": templates,
    "servers": servers,
    "optimizer": stale_masters,
}
"""Need nothing but Python."""

WHOLE: dict[str, Check] = {
    "tokenizer": tokenizer,
    "chat template": chat_template,
    "stop tokens": stop_tokens,
    "corpus": corpus,
    "positions": positions,
    "fixed masks": fixed_masks,
    "layout and memory": memory,
    "disk": disk,
}
"""Need torch, Megatron and transformers in their ranges."""
