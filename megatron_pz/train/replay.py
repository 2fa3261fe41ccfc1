"""Updates from saved rounds: what a run would learn from its journal, without an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_pz.batch.samples import to_samples
from megatron_pz.checkpoint.hf_export import export_hf
from megatron_pz.checkpoint.hf_import import load_hf_weights
from megatron_pz.checkpoint.journal import JOURNAL_FOLDER, CompletionJournal
from megatron_pz.checkpoint.saved_rounds import saved_rollouts
from megatron_pz.checkpoint.store import CheckpointStore
from megatron_pz.config.schema import Config
from megatron_pz.corpus.cursor import Cursor
from megatron_pz.corpus.playable import read_playable
from megatron_pz.errors import CheckpointError, ConfigError
from megatron_pz.platform.base import Platform, torch_dtype
from megatron_pz.platform.select import select_platform
from megatron_pz.tasks.base import Task
from megatron_pz.tasks.opened import opened
from megatron_pz.tasks.stragglers import num_begun
from megatron_pz.train.deal import deal
from megatron_pz.train.learn import Learner
from megatron_pz.train.model import build_model
from megatron_pz.train.parallel import Parallel, init_parallel, shutdown
from megatron_pz.train.step import Trainer
from megatron_pz.types import Paragraph, Sample, Tokenizer


def train_on_saved(
    config: Config,
    run_dir: Path,
    steps: Sequence[int],
    *,
    checkpoint: int | None = None,
    export: Path | None = None,
    tell: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> None:
    """Learn from the rounds of `steps`, one after the other. All ranks.

    Args:
        config: settings of the run that played them; `[train]` may differ.
        run_dir: of that run, or of `tools/play.py`: it holds `journal/`.
        checkpoint: step of the checkpoint of `run_dir` to go on from, with its optimizer; None: `model.hf_model`.
        export: where the policy is written as a Hugging Face folder afterwards; None: nowhere.
        tell: given the step and its metrics, on rank 0.

    Raises:
        CheckpointError: a round or the checkpoint is missing or not complete.
        ConfigError: the task generates nothing.
        NumericsError: an update is not finite; those before it were applied, nothing is exported.
    """
    platform = select_platform()
    if platform.name == "cpu":
        torch.set_num_threads(1)  # as the run: sums must not depend on it
    parallel = init_parallel(config.parallel, platform, config.train.seed)
    try:
        _train(config, run_dir, steps, checkpoint, export, tell, platform, parallel)
    finally:
        shutdown()


def _train(
    config: Config,
    run_dir: Path,
    steps: Sequence[int],
    checkpoint: int | None,
    export: Path | None,
    tell: Callable[[int, dict[str, float]], None],
    platform: Platform,
    parallel: Parallel,
) -> None:
    found = opened(config)
    folder, hf_config, task = found.folder, found.hf_config, found.task
    if not isinstance(task, Task):
        raise ConfigError(f"--task is {config.task.task}, which generates nothing that could be saved.")
    journal = CompletionJournal(run_dir / JOURNAL_FOLDER)
    # Read before a model is built: a missing round is told at once.
    corpus = _Corpus(config, found.tokenizer, task)
    rounds = [_samples(journal, step, task, corpus) if parallel.is_rank0 else (None, {}) for step in steps]

    chunks = build_model(hf_config, config, platform, parallel)
    if checkpoint is None and config.model.init == "pretrained":
        load_hf_weights(chunks, folder)
    trainer = Trainer(chunks, config, platform, parallel)
    if checkpoint is not None:
        place = run_dir / "checkpoints"
        store = CheckpointStore(place, config.checkpoint.keep, parallel.control_group) if place.is_dir() else None
        if store is None or checkpoint not in store.steps():
            has = store.steps() if store else []
            raise CheckpointError(f"{place} has no checkpoint of step {checkpoint}. It has: {has or 'none'}.")
        store.load(checkpoint, chunks, trainer.optimizer)
    learner = Learner(trainer, config.train, (export or run_dir).parent / "dumps", parallel.rank)
    for step, (samples, health) in zip(steps, rounds, strict=True):
        update = learner.learn(deal(samples, config, parallel, step, hf_config), step)
        if parallel.is_rank0:
            learned = {"loss": update.loss, "grad_norm": update.grad_norm, **update.metrics} if update.applied else {}
            tell(step, {**health, "lr": update.lr, **learned})
    if export is not None:
        dtype = torch_dtype(config.model.params_dtype)
        export_hf(chunks, folder, export, dtype=dtype, group=parallel.control_group, is_rank0=parallel.is_rank0)


class _Corpus:
    """What each round of a run began, from its corpus: read when it is asked for first."""

    def __init__(self, config: Config, tokenizer: Tokenizer, task: Task) -> None:
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self._paragraphs: Sequence[Paragraph] = ()

    def begun(self, step: int) -> tuple[int, list[Paragraph]]:
        """Seed and paragraphs of the round of `step`."""
        config = self.config
        if not self._paragraphs:
            path = config.corpus.data_path
            self._paragraphs, _ = read_playable(path, config, self.tokenizer, self.task.prompt_ids)
        per_step, seed = config.task.paragraphs_per_step, config.train.seed
        position = sum(num_begun(config.engine, per_step, before) for before in range(1, step))
        places = Cursor(len(self._paragraphs), seed).take(position, num_begun(config.engine, per_step, step))
        return seed, [self._paragraphs[place] for place in places]


def _samples(
    journal: CompletionJournal, step: int, task: Task, corpus: _Corpus
) -> tuple[list[Sample] | None, dict[str, float]]:
    """What the round of `step` teaches, and its health."""
    groups = task.groups(saved_rollouts(journal, step, task, corpus.begun), step)
    weights = {
        "generator_weight": corpus.config.task.generator_weight,
        "predictor_weight": corpus.config.task.predictor_weight,
    }
    return to_samples(groups, **weights), task.health(groups)
