"""Rules that settings keep, alone and together: one small function a subject, every fault reported at once.

Checked before any rank takes memory. What needs the model (heads that divide, the vocabulary) is checked where the
model is read; the names in `[transformer]`, `[optimizer]` and `[ddp]` where Megatron is imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from megatron_pz.config.layout_rules import LAYOUT_RULES, Rule
from megatron_pz.config.schema import Config
from megatron_pz.config.tables import PASS_THROUGH, SECTIONS, section_of
from megatron_pz.errors import ConfigError, LayoutError

GAMES = ("pretrain_zero", "random_span", "random_ntp", "entropy_ntp", "format_only", "rlvr")
"""Tasks that generate; the others train on text as it is."""

POSITIVE = {
    "model": ["make_vocab_size_divisible_by"],
    "parallel": [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "context_parallel_size",
    ],
    "corpus": ["min_paragraph_tokens", "max_paragraph_tokens"],
    "task": ["paragraphs_per_step", "n_masks_per_paragraph", "max_occurrences", "max_prompt_tokens", "span_max_words"],
    "engine": ["max_response_tokens", "max_running_requests"],
    "train": ["train_iters", "updates_per_batch", "max_tokens_per_micro_batch", "log_prob_chunk_tokens"],
    "sglang": ["num_servers", "weight_bucket_mib"],
    "verifier": ["verifier_max_tokens", "verifier_requests", "verifier_tries"],
    "evaluate": ["num_fixed_masks", "n_samples_per_fixed_mask"],
    "checkpoint": ["keep"],
}
"""Counts and sizes that must be 1 or more."""

NOT_NEGATIVE = {
    "parallel": ["expert_tensor_parallel_size"],
    "task": [
        "generator_weight",
        "predictor_weight",
        "advantage_eps",
        "answer_weight",
        "prompt_weight",
        "warm_up_task_steps",
    ],
    "engine": ["async_steps", "over_sampling"],
    "verifier": ["length_penalty", "length_penalty_cap", "verifier_pause_s"],
    "sglang": ["gpus_per_server", "server_port"],
    "train": ["seed", "lr", "min_lr", "lr_warmup_iters", "lr_decay_iters", "weight_decay", "clip_grad", "kl_coef"],
    "evaluate": ["eval_interval", "eval_temperature", "fixed_mask_seed"],
    "checkpoint": ["save_interval"],
    "report": ["show_rollouts"],
}


def validate(config: Config, world_size: int | None) -> None:
    """Returns when `config` can run on `world_size` ranks; None: nothing of it trains here, and the layout is not asked.

    Raises:
        LayoutError: every fault is one of the parallel sizes.
        ConfigError: anything else; the message names all faults, one a line.
    """
    layout = [] if world_size is None else [fault for rule in LAYOUT_RULES for fault in rule(config, world_size)]
    others = [fault for rule in RULES for fault in rule(config, world_size or 1)]
    if faults := others + layout:
        raise (ConfigError if others else LayoutError)("\n".join(faults))


def numbers_are_finite(config: Config, world_size: int) -> Iterator[str]:
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            value = getattr(getattr(config, section), field.name)
            if isinstance(value, float) and not math.isfinite(value):
                yield f"{section}.{field.name} is {value}; it must be a finite number."


def sizes_are_positive(config: Config, world_size: int) -> Iterator[str]:
    for section, names in POSITIVE.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value < 1:
                yield f"{section}.{name} is {value}; it must be 1 or more."
    for section, names in NOT_NEGATIVE.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value < 0:
                yield f"{section}.{name} is {value}; it must be 0 or more."


def paths_are_set(config: Config, world_size: int) -> Iterator[str]:
    for section, name, wanted in (
        ("model", "hf_model", "a Hugging Face folder or hub name"),
        ("corpus", "data_path", "a JSONL file or a folder of them"),
        ("checkpoint", "run_dir", "the folder that the run writes into"),
    ):
        if not getattr(getattr(config, section), name):
            yield f"{section}.{name} is empty; it must name {wanted}. Set it in the TOML file or with --{name}."


def paragraphs_fit_the_prompt(config: Config, world_size: int) -> Iterator[str]:
    corpus, task = config.corpus, config.task
    if corpus.min_paragraph_tokens > corpus.max_paragraph_tokens:
        yield (
            f"corpus.min_paragraph_tokens is {corpus.min_paragraph_tokens}, above max_paragraph_tokens "
            f"{corpus.max_paragraph_tokens}: no paragraph would be left. Lower it."
        )
    if task.task in GAMES and corpus.max_paragraph_tokens >= task.max_prompt_tokens:
        yield (
            f"corpus.max_paragraph_tokens is {corpus.max_paragraph_tokens} and task.max_prompt_tokens "
            f"{task.max_prompt_tokens}; a prompt holds the paragraph and its instructions, so it must be the larger. "
            "Raise --max-prompt-tokens or lower --max-paragraph-tokens."
        )


def groups_can_differ(config: Config, world_size: int) -> Iterator[str]:
    task = config.task
    if task.task not in GAMES:
        return
    if task.n_predictions_per_mask < 2:
        yield (
            f"task.n_predictions_per_mask is {task.n_predictions_per_mask}; it must be 2 or more: a prediction is "
            "judged against the others of its group."
        )
    if task.task == "pretrain_zero" and task.n_masks_per_paragraph == 1:
        yield (
            "task.n_masks_per_paragraph is 1; it must be 2 or more: a mask is judged against the others of its "
            "paragraph. Use --task random_span to train the predictor alone."
        )
    if config.engine.temperature <= 0:
        yield (
            f"engine.temperature is {config.engine.temperature}; it must be above 0 in training: greedy answers are all "
            "alike, and a group of equals teaches nothing. For greedy scoring set --eval-temperature 0."
        )


def masks_are_possible(config: Config, world_size: int) -> Iterator[str]:
    task = config.task
    if not 0 < task.max_mask_fraction <= 1:
        yield f"task.max_mask_fraction is {task.max_mask_fraction}; it must be above 0 and at most 1."
    if not 0 < task.span_p <= 1:
        yield f"task.span_p is {task.span_p}; it must be above 0 and at most 1, e.g. 0.2 for five words on average."


def roles_are_trained(config: Config, world_size: int) -> Iterator[str]:
    task = config.task
    if task.update == "alternate" and task.task != "pretrain_zero":
        yield (
            f"task.update is 'alternate' while task.task is {task.task!r}, which has one role; it goes with "
            "'pretrain_zero' only. Use --update joint."
        )
    if task.task == "pretrain_zero" and task.generator_weight == 0 and task.predictor_weight == 0:
        yield "task.generator_weight and task.predictor_weight are both 0: nothing would be trained. Raise one."
    if task.task in GAMES and task.task != "pretrain_zero" and task.predictor_weight == 0:
        yield f"task.predictor_weight is 0 under {task.task}, which trains predictions only. Raise it."
    if task.task == "sft" and task.answer_weight == 0 and task.prompt_weight == 0:
        yield "task.answer_weight and task.prompt_weight are both 0: nothing would be trained. Raise one."


def tasks_follow_each_other(config: Config, world_size: int) -> Iterator[str]:
    task = config.task
    if bool(task.warm_up_task) != (task.warm_up_task_steps > 0):
        yield (
            f"task.warm_up_task is {task.warm_up_task!r} and task.warm_up_task_steps {task.warm_up_task_steps}; a game that comes "
            "first needs a name and a number of steps. Set both or neither."
        )
    if task.warm_up_task and task.task not in GAMES[:-1]:
        yield (
            f"task.warm_up_task is {task.warm_up_task!r} before task.task {task.task!r}, which is no game: it is learned by another "
            "loss. Run them one after the other, with --load."
        )
    if task.warm_up_task and task.update == "alternate":
        yield "task.update is 'alternate' with a task.warm_up_task, whose steps would train nothing. Use --update joint."
    if "entropy_ntp" in (task.task, task.warm_up_task):
        if not 0 < task.entropy_share <= 1:
            yield f"task.entropy_share is {task.entropy_share}; it must be above 0 and at most 1, e.g. 0.2."
        if config.engine.stragglers == "continue":
            yield (
                "engine.stragglers is 'continue' under entropy_ntp, whose questions depend on the weights of the step that asks "
                "them: a resumed run could not ask the same. Use 'wait' or 'cut'."
            )


def answers_are_verified(config: Config, world_size: int) -> Iterator[str]:
    verifier = config.verifier
    if config.task.task != "rlvr":
        return
    if verifier.verifier == "model" and not verifier.verifier_urls:
        yield "verifier.verifier is 'model' and verifier.verifier_urls is empty: name its servers, or use --verifier rule."
    if verifier.verifier_timeout_s <= 0:
        yield f"verifier.verifier_timeout_s is {verifier.verifier_timeout_s}; it must be above 0."
    worst = 1 - verifier.length_penalty * verifier.length_penalty_cap
    if worst <= 0 or not -1 <= verifier.no_answer_reward <= 0:
        yield (
            f"verifier.length_penalty x length_penalty_cap leaves a right answer {worst:g} and verifier.no_answer_reward is "
            f"{verifier.no_answer_reward:g}; right must be paid more than wrong (0), and no answer -1 to 0. Change them."
        )
    if config.evaluate.eval_interval:
        yield (
            f"evaluate.eval_interval is {config.evaluate.eval_interval} under task 'rlvr', which has no paragraphs to mask. "
            "Set --eval-interval 0, and score checkpoints with tools/evaluate.py."
        )


def sampling_is_possible(config: Config, world_size: int) -> Iterator[str]:
    engine = config.engine
    if not 0 < engine.top_p <= 1:
        yield f"engine.top_p is {engine.top_p}; it must be above 0 and at most 1 (1 is off)."
    if engine.engine == "embedded":
        alone = {"async_steps": 0, "stragglers": "wait"}
        for name, value in alone.items():
            if (found := getattr(engine, name)) != value:
                yield (
                    f"engine.{name} is {found!r} while engine.engine is 'embedded', which samples and trains in turns; "
                    f"it must be {value!r}, or use --engine sglang."
                )
        stages = config.parallel.pipeline_model_parallel_size
        if stages > 1 and (config.task.task in GAMES or config.evaluate.eval_interval):
            yield (
                f"parallel.pipeline_model_parallel_size is {stages} while engine.engine is 'embedded', which samples from "
                "whole models; it must be 1, or use --engine sglang."
            )
        if config.train.routing_replay:
            yield "train.routing_replay is true while engine.engine is 'embedded': no server chooses experts. Use --engine sglang."


def servers_are_named_or_started(config: Config, world_size: int) -> Iterator[str]:
    sglang = config.sglang
    if sglang.router_url and not sglang.server_urls:
        yield "sglang.router_url is set and sglang.server_urls is empty: control calls go to each server. Name them too."
    if sglang.colocate and (config.engine.async_steps or config.engine.stragglers == "continue"):
        yield (
            f"sglang.colocate is true with engine.async_steps {config.engine.async_steps} and engine.stragglers "
            f"{config.engine.stragglers!r}: requests would be under way while the servers have no memory. Use 0 and 'wait' or 'cut'."
        )
    if sglang.rollout_precision != "trained" and not (sglang.gpus_per_server or sglang.server_urls):
        yield (
            f"sglang.rollout_precision is {sglang.rollout_precision!r} with sglang.gpus_per_server 0: SGLang computes FP8 on GPUs. "
            "Set --gpus-per-server 1 or more, or leave it at 'trained'."
        )
    if (config.engine.over_sampling > 0) != (config.engine.stragglers != "wait"):
        yield (
            f"engine.over_sampling is {config.engine.over_sampling} while engine.stragglers is {config.engine.stragglers!r}; "
            "more paragraphs are begun than are needed where stragglers are cut or go on, and nowhere else. Set both."
        )


def fp8_is_possible(config: Config, world_size: int) -> Iterator[str]:
    model = config.model
    if model.fp8_param_gather and (model.fp8 == "off" or not config.parallel.use_distributed_optimizer):
        yield (
            f"model.fp8_param_gather is true with model.fp8 {model.fp8!r} and parallel.use_distributed_optimizer "
            f"{config.parallel.use_distributed_optimizer}; it needs a recipe, e.g. --fp8 blockwise, and the distributed optimizer."
        )
    if model.fp8 == "off":
        return
    if model.params_dtype != "bfloat16":
        yield f"model.params_dtype is {model.params_dtype!r} while model.fp8 is {model.fp8!r}; it must be 'bfloat16'."
    if model.fp8 == "delayed" and config.transformer.get("first_last_layers_bf16"):
        yield (
            "transformer.first_last_layers_bf16 is true while model.fp8 is 'delayed', whose scales span all layers; use "
            "--fp8 blockwise or tensorwise, or leave it out."
        )
    generates = config.task.task in GAMES or config.evaluate.eval_interval > 0
    if config.engine.engine == "embedded" and generates:
        yield (
            f"model.fp8 is {model.fp8!r} while engine.engine is 'embedded', which decodes a few tokens at a time, and FP8 "
            "products take multiples of 16. Use --engine sglang."
        )


def learning_rate_falls(config: Config, world_size: int) -> Iterator[str]:
    train = config.train
    if train.lr_decay_style != "constant" and train.min_lr > train.lr:
        yield (
            f"train.min_lr is {train.min_lr}, above train.lr {train.lr}; the decay ends there, so it must be at most "
            "lr. Set --min-lr too (or --lr-decay-style constant)."
        )
    decay_iters = train.lr_decay_iters or train.train_iters
    if train.lr_warmup_iters > 0 and train.lr_warmup_iters >= decay_iters:
        yield (
            f"train.lr_warmup_iters is {train.lr_warmup_iters} while the decay ends after {decay_iters} steps; "
            "the warm-up must be shorter."
        )


def optimizer_is_stable(config: Config, world_size: int) -> Iterator[str]:
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(config.train, name)
        if not 0 <= value < 1:
            yield f"train.{name} is {value}; it must be at least 0 and below 1."


def clips_bound_the_ratio(config: Config, world_size: int) -> Iterator[str]:
    train = config.train
    if not 0 < train.eps_clip < 1:
        yield f"train.eps_clip is {train.eps_clip}; it must be between 0 and 1: the ratio is held above 1 - eps_clip."
    if train.eps_clip_high <= 0:
        yield f"train.eps_clip_high is {train.eps_clip_high}; it must be above 0: the ratio is held below 1 + it."
    if train.importance_cap <= 1:
        yield f"train.importance_cap is {train.importance_cap}; it must be above 1, the ratio of a token on which both agree."
    if train.dual_clip != 0 and train.dual_clip <= 1:
        yield f"train.dual_clip is {train.dual_clip}; it must be above 1 (e.g. 10), or 0 for off."


def one_place_a_setting(config: Config, world_size: int) -> Iterator[str]:
    for table in PASS_THROUGH:
        for name in getattr(config, table):
            if (home := section_of(name)) is not None:
                yield f"{table}.{name} has a place of its own, {home}.{name}. Set it there (--{name.replace('_', '-')})."


RULES: tuple[Rule, ...] = (
    numbers_are_finite,
    sizes_are_positive,
    paths_are_set,
    paragraphs_fit_the_prompt,
    groups_can_differ,
    masks_are_possible,
    roles_are_trained,
    tasks_follow_each_other,
    answers_are_verified,
    sampling_is_possible,
    servers_are_named_or_started,
    fp8_is_possible,
    learning_rate_falls,
    optimizer_is_stable,
    clips_bound_the_ratio,
    one_place_a_setting,
)
