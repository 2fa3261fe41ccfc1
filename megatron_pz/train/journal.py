"""What a run writes about each step, and about itself: rank 0 does."""

from __future__ import annotations

import hashlib
import json
import platform as machine
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from megatron_pz import __version__
from megatron_pz.config.load import to_toml
from megatron_pz.config.schema import Config
from megatron_pz.errors import DiskError
from megatron_pz.report.alarms import Watch, told
from megatron_pz.report.console import Console
from megatron_pz.report.timers import Timers
from megatron_pz.report.writers import RunWriter
from megatron_pz.tasks.journal_rows import journal_rows
from megatron_pz.train.play import Round
from megatron_pz.types import Group, UpdateResult

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "numpy")


class RunJournal:
    """Where steps go on record. An alarm is told when it first sounds in the run, restarts included.

    Args:
        writer: of the run directory; None on ranks other than 0, which write nothing.
        watch: has seen the rows that the run directory held before.
    """

    def __init__(self, writer: RunWriter | None, console: Console, config: Config, watch: Watch | None = None) -> None:
        self.writer, self.console, self.config, self._watch = writer, console, config, watch or Watch()

    def write(
        self,
        step: int,
        facts: Mapping[str, float],
        played: Round | None,
        update: UpdateResult | None,
        scores: Mapping[str, float],
        timers: Timers,
    ) -> None:
        """Put a step on record: `metrics.jsonl`, `rollouts.jsonl`, TensorBoard, the console.

        Args:
            facts: metrics that are neither the round's nor the update's.
        """
        times = timers.lap()
        if self.writer is None:
            return
        metrics: dict[str, float] = dict(facts) | dict(played.metrics if played else {})
        if played and played.groups:
            metrics["tokens/generated"] = float(_num_generated(played.groups))
        if update is not None:
            metrics |= {"lr": update.lr}
            if update.applied:
                metrics |= {"loss": update.loss, "grad_norm": update.grad_norm, **update.metrics}
        metrics |= {**scores, "memory/rss_bytes": float(psutil.Process().memory_info().rss), **times}
        alarms = self._watch.see({"step": step, **metrics})
        self.writer.metrics(step, metrics | {"alarms/sounding": float(self._watch.num_sounding())})
        if played and played.groups:
            self.writer.rollouts(journal_rows(played.groups, step))
        self.console.step(step, metrics)
        for alarm in alarms:
            self.console.message(told(alarm, step))
        if played and scores and self.config.report.show_rollouts:
            self.console.show_games(played.groups, self.config.report.show_rollouts, self.config.task.at(step))


def _num_generated(groups: Sequence[Group]) -> int:
    return sum(len(rollout.completion.token_ids) for group in groups for rollout in group.rollouts)


def describe_run(config: Config, run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Write `config.toml` and `run.json`: what was run, with which versions, on which text.

    Raises:
        DiskError: no room or no right.
    """
    about = {
        "megatron_pz": __version__,
        "commit": _commit(),
        "python": machine.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        **facts,
    }
    write_whole(run_dir / "config.toml", to_toml(config))
    write_whole(run_dir / "run.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a small text file so that readers see the old one or the new one."""
    partial = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.rename(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise DiskError(
            f"{path} cannot be written: {error.strerror}. Free some room, or give the run another --run-dir."
        ) from error


def hashes(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of files, by name."""
    found = {}
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _commit() -> str | None:
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
