"""Play the game against SGLang servers that run already, and write the rollouts down. No trainer.

    python tools/play.py CONFIG.toml --server-urls http://node1:30000 [--api-key-file FILE] [--flag value ...]

Takes a run's own TOML file and flags and plays `--train-iters` rounds of it, all with the servers' weights, into
--run-dir:

    config.toml                  the settings
    rollouts.jsonl               one line a rollout, as of a run; tools and the page read it
    metrics.jsonl                one line a round: rewards, masks, predictions, groups
    journal/step_NNNNNN.jsonl    one line a response, with all token ids and log-probs

Started again, it goes on: what the servers answered before is read back, as long as they have the same weights.
tools/replay_step.py RUN_DIR STEP trains on a round. Needs neither torch nor Megatron.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_pz.checkpoint.journal import JOURNAL_FOLDER, CompletionJournal
from megatron_pz.config.load import load_config, to_toml
from megatron_pz.config.rules import validate
from megatron_pz.config.schema import Config
from megatron_pz.corpus.cursor import Cursor
from megatron_pz.corpus.playable import read_playable
from megatron_pz.engine.sglang.attached import attached
from megatron_pz.engine.sglang.specs import context_length, server_urls
from megatron_pz.errors import ConfigError, MegatronPZError
from megatron_pz.report.writers import RunWriter
from megatron_pz.tasks.base import Task
from megatron_pz.tasks.journal_rows import journal_rows
from megatron_pz.tasks.opened import opened
from megatron_pz.tasks.stragglers import Stragglers, num_begun
from megatron_pz.types import Generate, Paragraph


def main(argv: Sequence[str]) -> int:
    """See the module; 0 when all rounds are played, 2 after an error that a user can mend."""
    if not argv:
        sys.stderr.write(__doc__ or "")
        return 2
    try:
        config = load_config(argv)
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, engine="sglang"))
        validate(config, None)
        if not server_urls(config):
            raise ConfigError("--server-urls is empty: name the servers to play with. tools/serve.py starts some.")
        asyncio.run(_attached(config))
    except MegatronPZError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    return 0


async def _attached(config: Config) -> None:
    """Play with the servers of `config`."""
    found = opened(config)
    task, hf_config = found.task, found.hf_config
    if not isinstance(task, Task):
        raise ConfigError(f"--task is {config.task.task}, in which nothing is generated: there is nothing to play.")
    paragraphs, _ = read_playable(config.corpus.data_path, config, found.tokenizer, task.prompt_ids)
    layers, experts = hf_config["num_hidden_layers"], hf_config.get("num_experts_per_tok")
    shape = (int(layers), int(experts)) if config.train.routing_replay and experts else None
    longest = context_length(config, hf_config)
    async with attached(config, hf_config, longest, _waits, shape) as (generate, weights):
        await play(config, task, paragraphs, generate, weights, _said)


async def play(
    config: Config,
    task: Task,
    paragraphs: Sequence[Paragraph],
    generate: Generate,
    weights: str,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Play all rounds of `config`, and write them into its run directory.

    Args:
        weights: name of what samples; a journal of others is not read back.
    """
    run_dir = Path(config.checkpoint.run_dir)
    seed, per_step = config.train.seed, config.task.paragraphs_per_step
    writer = RunWriter(run_dir, tensorboard=False)  # rows are written anew, from the journal where it has them
    (run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
    journal = CompletionJournal(run_dir / JOURNAL_FOLDER)
    rounds = Stragglers(
        task,
        config.engine,
        per_step,
        seed,
        recorded=lambda step: journal.taken(step, weights),
        record=lambda step, taken: journal.note_taken(step, taken, weights),
    )
    cursor, position = Cursor(len(paragraphs), seed), 0
    try:
        for step in range(1, config.train.train_iters + 1):
            count = num_begun(config.engine, per_step, step)
            texts = [paragraphs[index] for index in cursor.take(position, count)]
            kept = journal.keep(generate, step, weights=weights)
            journal.note_begun(step, seed, texts)
            played = await rounds.play(step, texts, kept)
            groups = task.groups(played.rollouts, step)
            drawn = {"epoch": position / len(paragraphs), "num_paragraphs": float(count)}
            writer.rollouts(journal_rows(groups, step))
            writer.metrics(step, {**drawn, **task.health(groups), **played.metrics})
            say(f"round {step}: {kept.num_generated} responses generated, {kept.num_read} read back")
            position += count
    finally:
        await rounds.close()
        journal.close()
        writer.close()


def _waits(line: str) -> None:
    sys.stderr.write(line + "\n")


def _said(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
