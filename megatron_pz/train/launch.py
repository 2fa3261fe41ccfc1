"""Config to parts to loop: the only file that builds everything.

python -m megatron_pz CONFIG.toml [--flag value ...]                          one process
torchrun --nproc-per-node N -m megatron_pz CONFIG.toml [--flag value ...]     N processes
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch

from megatron_pz.checkpoint.hf_export import export_hf
from megatron_pz.checkpoint.hf_import import load_hf_weights
from megatron_pz.checkpoint.store import CheckpointStore, load_weights
from megatron_pz.config.load import load_config
from megatron_pz.config.rules import validate
from megatron_pz.config.schema import Config
from megatron_pz.corpus.cursor import Cursor
from megatron_pz.corpus.playable import read_playable
from megatron_pz.corpus.store import CARD
from megatron_pz.engine.base import Engine, converse
from megatron_pz.errors import GRACE_S, ConfigError, MegatronPZError
from megatron_pz.evaluate.fixed_masks import FixedMasks, score
from megatron_pz.platform.base import Platform, torch_dtype
from megatron_pz.platform.select import select_platform
from megatron_pz.report.alarms import Watch
from megatron_pz.report.console import Console
from megatron_pz.report.jsonl import METRICS_FILE, read_rows
from megatron_pz.report.page import write_page
from megatron_pz.report.summary import summary_lines
from megatron_pz.report.timers import Timers
from megatron_pz.report.writers import RunWriter
from megatron_pz.tasks.ask import Asker
from megatron_pz.tasks.base import Task
from megatron_pz.tasks.opened import opened
from megatron_pz.tasks.stragglers import Stragglers, num_begun
from megatron_pz.train.collector import spared_collector
from megatron_pz.train.deal import deal
from megatron_pz.train.engines import make_engine
from megatron_pz.train.entropies import with_entropies
from megatron_pz.train.fixed_sets import fixed_sets
from megatron_pz.train.journal import RunJournal, describe_run, hashes
from megatron_pz.train.learn import Learner
from megatron_pz.train.loop import run
from megatron_pz.train.memory import Memory, OwnMemory, SharedMemory
from megatron_pz.train.model import build_model
from megatron_pz.train.parallel import Parallel, init_parallel, shutdown
from megatron_pz.train.parts import Parts
from megatron_pz.train.play import Corpus, GamePlayer, Player, Rounds, TextPlayer
from megatron_pz.train.record import NoRecord, Record, ServerRecord
from megatron_pz.train.signals import StopSignals
from megatron_pz.train.state import RunState
from megatron_pz.train.step import Trainer
from megatron_pz.types import Paragraph


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say; 0 when the run is done or was asked to stop, 2 after an error that a user can mend."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    except MegatronPZError as error:
        if rank:  # all ranks read the same; torchrun ends rank 0, before it has told, with the first that leaves
            time.sleep(GRACE_S)
        else:
            _tell(error)
        return 2
    try:
        train(config)
    except MegatronPZError as error:
        _tell(error, f"rank {rank}: " if rank else "")
        return 2
    return 0


def _tell(error: MegatronPZError, who: str = "") -> None:
    sys.stderr.write(f"{who}{type(error).__name__}: {error}\n")


def train(config: Config) -> RunState:
    """Build everything, train, save and export; the state at the end."""
    platform = select_platform()
    if platform.name == "cpu":
        torch.set_num_threads(1)  # small matrices lose by threads; and sums must not depend on their number
    parallel = init_parallel(config.parallel, platform, config.train.seed)
    try:
        return _train(config, platform, parallel)
    finally:
        shutdown()


def _train(config: Config, platform: Platform, parallel: Parallel) -> RunState:
    run_dir = Path(config.checkpoint.run_dir)
    found = opened(config)
    folder, hf_config, tokenizer, task = found.folder, found.hf_config, found.tokenizer, found.task
    paragraphs, counts = read_playable(config.corpus.data_path, config, tokenizer, task.prompt_ids)
    sets = fixed_sets(config, tokenizer, found.templates, paragraphs) if config.evaluate.eval_interval else []

    chunks = build_model(hf_config, config, platform, parallel)
    if config.checkpoint.load:
        load_weights(chunks, Path(config.checkpoint.load), parallel.control_group)
    elif config.model.init == "pretrained":
        load_hf_weights(chunks, folder)
    trainer = Trainer(chunks, config, platform, parallel)
    timers = Timers()
    learner = Learner(trainer, config.train, run_dir / "dumps", parallel.rank, timers)
    store = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep, parallel.control_group)
    state = RunState(config.train.seed)
    if steps := store.steps():
        state = RunState.from_json(store.load(steps[-1], chunks, trainer.optimizer))
        if state.seed != config.train.seed:
            raise ConfigError(
                f"--seed is {config.train.seed}, the run in {run_dir} was begun with {state.seed}, and its order of paragraphs "
                f"and samples depends on it. Go on with --seed {state.seed}, or give --run-dir another folder."
            )
    console = Console(config.train.train_iters, state.step, enabled=parallel.is_rank0)
    has_record = config.engine.engine == "sglang" and parallel.is_rank0
    if config.sglang.colocate:  # before servers start, which take what memory is free then
        trainer.sleep()
        platform.release_unused()
    record: Record = ServerRecord(run_dir, chunks, config.engine) if has_record else NoRecord()
    engine = make_engine(config, chunks, parallel, folder, hf_config, console.message)
    with closing(engine), closing(record), closing(store):
        engine.load(chunks, state.policy_version)
        writer = None
        if parallel.is_rank0:
            given = [Path(config.corpus.data_path), Path(config.corpus.held_out_path)]
            corpus_files = [path / CARD if path.is_dir() else path for path in given]
            facts = {
                "model": config.model.hf_model,
                "parameters": sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
                "world_size": parallel.world_size,
                "paragraphs": counts,
                "attribution": _attribution(Path(config.corpus.data_path)),
                "hashes": hashes([*corpus_files, *sorted(folder.glob("*.safetensors"))]),
            }
            describe_run(config, run_dir, facts)
            writer = RunWriter(
                run_dir,
                state.step,
                tensorboard=config.report.tensorboard,
                wandb_project=config.report.wandb_project,
                wandb_config=dataclasses.asdict(config),
            )
            console.message(f"{len(paragraphs)} paragraphs ({_told(counts)}); run directory {run_dir}")
            if config.checkpoint.load and not state.step:
                console.message(f"weights of {config.checkpoint.load}; the optimizer begins anew")
            if restarts := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
                console.message(f"torchrun has started the ranks again, time {restarts}")
            if state.step:
                console.message(f"continuing after step {state.step}")
        per_step = config.task.paragraphs_per_step

        def study(step: int, begun: Sequence[Paragraph]) -> Sequence[Paragraph]:
            is_due = config.task.at(step) == "entropy_ntp"
            return with_entropies(begun, tokenizer, trainer, config) if is_due else begun

        player: Player = (
            GamePlayer(
                task,
                engine,
                config.task,
                Stragglers(task, config.engine, per_step, config.train.seed, record.taken, record.note_taken),
                record.keep,
                study,
            )
            if isinstance(task, Task)
            else TextPlayer(task, parallel.is_rank0, config.train.seed)
        )

        def stands(path: Path | None) -> None:
            if path:
                console.message(f"checkpoint {path}")
                record.prune(store.steps())

        def settle(wait: bool) -> None:
            if store.is_saving:
                with timers("checkpoint"):
                    stands(store.settle(wait=wait))

        def save(at: RunState, *, drops_old: bool = True, in_background: bool = config.checkpoint.async_save) -> None:
            settle(True)
            how = {"drops_old": drops_old, "in_background": in_background}
            stands(store.save(at.step, chunks, trainer.optimizer, at.to_json(), **how, tell=console.message))

        def rescue(at: RunState) -> None:
            settle(True)
            if at.step not in store.steps():
                save(at, drops_old=False, in_background=False)

        with StopSignals(parallel.control_group) as signals, console:
            parts = Parts(
                rounds=Rounds(
                    Corpus(paragraphs, Cursor(len(paragraphs), config.train.seed)),
                    player,
                    num_begun=lambda step: num_begun(config.engine, per_step, step),
                    ahead=config.engine.async_steps,
                    last=config.train.train_iters,
                    start=state,
                ),
                deal=lambda played, step: deal(played.samples if played else None, config, parallel, step, hf_config),
                learner=learner,
                trainer=trainer,
                engine=engine,
                memory=_memory(config, engine, trainer, platform),
                evaluate=_evaluator(config, sets, engine, writer),
                journal=RunJournal(writer, console, config, Watch(read_rows(run_dir / METRICS_FILE) if writer else ())),
                save=save,
                settle=settle,
                rescue=rescue,
                signals=signals,
                tell=console.message,
                timers=timers,
            )
            try:
                with spared_collector():
                    state = run(parts, config, state)
            finally:
                if writer:
                    writer.close()
    if config.checkpoint.export_hf and state.step >= config.train.train_iters:
        export_hf(
            chunks,
            folder,
            run_dir / "hf",
            dtype=torch_dtype(config.model.params_dtype),
            group=parallel.control_group,
            is_rank0=parallel.is_rank0,
        )
        console.message(f"Hugging Face export {run_dir / 'hf'}")
    if parallel.is_rank0 and config.report.write_page:
        console.message(f"page {write_page(run_dir)}")
    if parallel.is_rank0:
        for line in summary_lines(read_rows(run_dir / METRICS_FILE)):
            console.message(line)
    return state


def _memory(config: Config, engine: Engine, trainer: Trainer, platform: Platform) -> Memory:
    if not config.sglang.colocate:
        return OwnMemory(platform)
    return SharedMemory(engine.sleep, engine.wake, trainer.sleep, trainer.wake, platform)


def _evaluator(
    config: Config,
    sets: list[tuple[FixedMasks, Asker]],
    engine: Engine,
    writer: RunWriter | None,
) -> Callable[[int], Mapping[str, float]]:
    """Scores every set; metrics on rank 0, which also writes the answers down, and nothing elsewhere."""

    async def scored(step: int) -> dict[str, float]:
        metrics: dict[str, float] = {}
        results = await asyncio.gather(
            *(score(questions, asker, engine.generate, config.evaluate) for questions, asker in sets)
        )
        for found, rows in results:
            metrics |= found
            if writer:
                writer.evaluation([{"step": step, **row} for row in rows])
        return metrics

    def evaluate(step: int) -> Mapping[str, float]:
        return converse(engine, lambda: scored(step)) or {}

    return evaluate


def _attribution(data_path: Path) -> str | None:
    """Text of ATTRIBUTION.txt beside the corpus, where there is one."""
    file = (data_path if data_path.is_dir() else data_path.parent) / "ATTRIBUTION.txt"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)
