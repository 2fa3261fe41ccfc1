"""Where the gap between the engine's log-probs and the trainer's comes from, as a budget in nats.

The tokens that a run saved (`journal/`) are scored again in the trainer's own way, then with one thing changed to what the
engine might have done. The change that closes most of the gap is kept, and the rest is looked for on top of it, until
nothing closes a clear share. So the lines add up, and what no change closes is told as unexplained.

What cannot be told apart:
- Rounding in the engine's kernels: a server in bfloat16 rounds in its own order, and the trainer in bfloat16 repeats part of it
  only. Norms that compute in bfloat16 show only where their weights are rounded, or as a part of "bf16 against float32".
- Weights sent rounded to bfloat16 and a server that computes in bfloat16: the one that fits better is named.
- A server that kept old weights, and one whose stamps are right while the trainer is ahead: both are "stale versions", told apart by
  whether the tokens' stamps, or the version before them, fit.
- Stale prefixes are looked for where a prompt begins as an earlier saved request did, with keys of one version before. What a
  server had in its cache is not on record; prefixes older than that, or of requests that are not saved, stay unexplained.
- Experts that differ because the precision does: closed by replay and by the precision; the larger share is named first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_pz.checkpoint.completion_lines import completions, read_lines
from megatron_pz.checkpoint.journal import JOURNAL_FOLDER, CompletionJournal
from megatron_pz.checkpoint.store import STATE
from megatron_pz.config.schema import Config
from megatron_pz.errors import CheckpointError, ConfigError
from megatron_pz.models.rope import read_rope
from megatron_pz.platform.select import select_platform
from megatron_pz.train.parallel import init_parallel, shutdown
from megatron_pz.train.rescoring import Reading, Rescorer, SavedRound, pack
from megatron_pz.train.state import RunState
from megatron_pz.types import Completion

FLOOR = 1e-5
"""Nats: a mean gap below it is float32's last bits."""
NAMED = 0.1
"""Share of the gap that a change must close to be named."""
TEMPERATURES = (0.25, 2.0)
ROPE_BASES = (1e4, 5e5, 1e6, 5e6)
"""What models and servers have as a default."""


@dataclass(frozen=True)
class Change:
    """One thing that the engine might have done otherwise."""

    cause: str
    found: str  # what, in words
    setting: str  # what removes it
    reading: Reading


@dataclass(frozen=True)
class Line:
    """A cause, and what it takes away."""

    cause: str
    nats: float  # of the mean absolute gap
    share: float
    found: str
    setting: str


@dataclass(frozen=True)
class Budget:
    """The gap of the rounds of `steps`, split."""

    steps: tuple[int, ...]
    num_tokens: int
    mean: float  # absolute, nats
    largest: float
    lines: tuple[Line, ...]  # the largest first
    unexplained: float  # nats of `mean`
    not_looked_for: tuple[str, ...]  # what, and why

    def told(self) -> list[str]:
        """The table, line by line."""
        steps = f"step {self.steps[0]}" if len(self.steps) == 1 else f"steps {self.steps[0]} to {self.steps[-1]}"
        told = [f"{steps}, {self.num_tokens} tokens: mean gap {self.mean:.2e} nats, largest {self.largest:.2e}"]
        if self.mean < FLOOR:
            told.append(f"Nothing to explain: below {FLOOR:g} nats engine and trainer differ by float32's last bits.")
        else:
            rows = [("cause", "nats", "share", "what closes it", "setting")]
            rows += [
                (line.cause, f"{line.nats:.2e}", f"{line.share:.0%}", line.found, line.setting) for line in self.lines
            ]
            rows.append(("unexplained", f"{self.unexplained:.2e}", f"{self.unexplained / self.mean:.0%}", "", ""))
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            told += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return told + [f"not looked for: {why}" for why in self.not_looked_for]


def mismatch_budget(config: Config, run_dir: Path, steps: Sequence[int] = (), *, max_tokens: int = 20000) -> Budget:
    """The budget of saved rounds. All ranks of the layout; equal on each.

    Args:
        config: settings of the run; `[parallel]` may differ.
        run_dir: of the run; its `journal/` and `checkpoints/` are read.
        steps: empty: the newest two that can be scored.
        max_tokens: of each round; completions beyond it are left out.

    Raises:
        CheckpointError: no round is there, or not the weights that learned from one.
        ConfigError: context parallelism.
    """
    if config.parallel.context_parallel_size > 1:
        raise ConfigError(
            f"parallel.context_parallel_size is {config.parallel.context_parallel_size}; saved tokens are scored with 1. "
            "Add --context-parallel-size 1."
        )
    versions, learners = saved_versions(run_dir)
    rounds = saved_rounds(config, run_dir, learners, steps, max_tokens)
    platform = select_platform()
    if platform.name == "cpu":
        torch.set_num_threads(1)  # as the run
    parallel = init_parallel(config.parallel, platform, config.train.seed)
    try:
        return split(Rescorer(config, versions, platform, parallel), rounds, Reading.of(config))
    finally:
        shutdown()


def saved_versions(run_dir: Path) -> tuple[dict[int, Path | None], dict[int, int]]:
    """Checkpoint of each policy version (None: what the run began with), and by step the version that learned from its
    round, where the checkpoint before it says so."""
    versions: dict[int, Path | None] = {0: None}
    learners = {1: 0}
    for folder in sorted((run_dir / "checkpoints").glob("step_*")):
        state = RunState.from_json((folder / STATE).read_text(encoding="utf-8"))
        learners[state.step + 1] = state.policy_version
        if state.policy_version:
            versions[state.policy_version] = folder
    return versions, learners


def saved_rounds(
    config: Config, run_dir: Path, learners: dict[int, int], steps: Sequence[int], max_tokens: int
) -> list[SavedRound]:
    """Rounds that are on record with the weights that learned from them.

    Raises:
        CheckpointError: none is, or one of `steps` is not.
    """
    journal = CompletionJournal(run_dir / JOURNAL_FOLDER)
    answers: dict[int, list[Completion]] = {}
    for path in sorted(journal.folder.glob("step_*.jsonl")):
        found = [recorded.completion for recorded in completions(read_lines(path))]
        answers[int(path.stem.removeprefix("step_"))] = [answer for answer in found if answer.token_ids]
    usable = [step for step, found in answers.items() if found and step in learners]
    lacking = sorted(set(steps) - set(usable))
    if lacking or not usable:
        which = f"step {lacking[0]} cannot" if lacking else "no step can"
        raise CheckpointError(
            f"{run_dir}: {which} be scored: that takes journal/step_N.jsonl and the checkpoint of the step before. Rounds on "
            f"record: {sorted(answers) or 'none'}; with their weights: {usable or 'none'}. Rounds are kept from the oldest "
            "checkpoint on, and with engine sglang only: run with --save-interval 1 and a larger --keep."
        )
    rounds = []
    for step in sorted(steps) or usable[-2:]:
        chosen: list[Completion] = []
        count = 0
        for answer in answers[step]:
            count += len(answer.prompt_ids) + len(answer.token_ids)
            if chosen and count > max_tokens:
                break
            chosen.append(answer)
        earlier = [answer for before, found in answers.items() if before < step for answer in found]
        rounds.append(pack(step, learners[step], chosen, earlier, config))
    return rounds


def split(rescorer: Rescorer, rounds: Sequence[SavedRound], own: Reading) -> Budget:
    """The budget; see the module."""
    known: dict[Reading, float] = {}

    def gap(reading: Reading) -> float:
        if reading not in known:
            known[reading] = float(np.abs(_gaps(rescorer, rounds, reading)).mean())
        return known[reading]

    begun = np.abs(_gaps(rescorer, rounds, own))
    total = left = known[own] = float(begun.mean())
    lines: list[Line] = []
    current, missed = own, set[str]()
    while left >= FLOOR:
        changes = [
            change
            for change in _changes(rescorer, rounds, current, gap, missed)
            if change.cause not in {line.cause for line in lines}
        ]
        best = min(changes, key=lambda change: gap(change.reading), default=None)
        if best is None or left - gap(best.reading) < NAMED * total:
            break
        nats = left - gap(best.reading)
        lines.append(Line(best.cause, nats, nats / total, best.found, best.setting))
        current, left = best.reading, gap(best.reading)
    lines.sort(key=lambda line: -line.nats)
    steps = tuple(played.step for played in rounds)
    return Budget(steps, begun.size, total, float(begun.max()), tuple(lines), left, tuple(sorted(missed)))


def _gaps(rescorer: Rescorer, rounds: Sequence[SavedRound], reading: Reading) -> np.ndarray:
    return np.concatenate([rescorer.gaps(played, reading) for played in rounds])


def _changes(
    rescorer: Rescorer,
    rounds: Sequence[SavedRound],
    now: Reading,
    gap: Callable[[Reading], float],
    missed: set[str],
) -> Iterator[Change]:
    """Every change that can be tried on top of `now`; why others cannot goes into `missed`."""
    yield from _sampling(rescorer.config, now, gap)
    yield from _precision(rescorer.config, now)
    yield from _rope(rescorer, now)
    if rescorer.is_moe:
        if any(played.has_experts for played in rounds):
            found = "routers choose" if now.replays_routing else "the server's experts"
            setting = f"[train] routing_replay = {str(not now.replays_routing).lower()}"
            yield Change("router choice", found, setting, replace(now, replays_routing=not now.replays_routing))
        else:
            missed.add(
                "router choice: the journal has no experts; with [train] routing_replay = true the server tells them"
            )
    for change in _stale(rounds, now):
        used = {version for played in rounds for version in rescorer.used_versions(played, change.reading)}
        if lacking := sorted(used - set(rescorer.versions)):
            missed.add(
                f"{change.cause}: no checkpoint of policy version {lacking[0]}; keep more (--save-interval, --keep)"
            )
        else:
            yield change
    if not any(played.has_prefixes for played in rounds):
        missed.add("stale prefix cache: no earlier round is on record that a prompt shares its beginning with")


def _sampling(config: Config, now: Reading, gap: Callable[[Reading], float]) -> Iterator[Change]:
    def at(temperature: float) -> Reading:
        return replace(now, temperature=temperature)

    low, high = TEMPERATURES
    ratio = (5**0.5 - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    while high - low > 0.02:  # golden section
        if gap(at(inner[0])) < gap(at(inner[1])):
            high = inner[1]
            inner = [high - ratio * (high - low), inner[0]]
        else:
            low = inner[0]
            inner = [inner[1], low + ratio * (high - low)]
    middle = (low + high) / 2
    tried = {1.0, round(middle, 2), round(middle * 20) / 20} - {now.temperature}
    best = min(tried or {now.temperature}, key=lambda temperature: gap(at(temperature)))
    setting = f"[engine] temperature: {now.temperature:g} here; the same in the requests and in the server"
    yield Change("temperature", f"temperature {best:g}", setting, at(best))
    if config.engine.top_p < 1:
        top_p = 1.0 if now.top_p < 1 else config.engine.top_p
        found = f"log-probs of the nucleus {top_p:g}" if top_p < 1 else "log-probs of the whole vocabulary"
        setting = "[engine] top_p = 1.0, or an engine that reports log-probs before top-p"
        yield Change("top-p", found, setting, replace(now, top_p=top_p))


def _precision(config: Config, now: Reading) -> Iterator[Change]:
    server = "[server] dtype, [model] params_dtype"
    if now.dtype == "float32":
        if config.model.fp8 == "off":
            yield Change(
                "bf16 against float32", "bfloat16 throughout", server, replace(now, dtype="bfloat16", rounded="")
            )
        for which, cause, found, setting in (
            (
                "all",
                "bf16 against float32",
                "all weights rounded to bfloat16",
                f"{server}: weights are sent as trained",
            ),
            ("head", "head precision", "the head's weights rounded to bfloat16", f"{server}: of the head"),
            ("norms", "norm precision", "the norms' weights rounded to bfloat16", f"{server}: of the norms"),
        ):
            yield Change(cause, found, setting, replace(now, rounded=which))  # type: ignore[arg-type]
        if now.head_dtype is None:
            found = "logits in bfloat16"
            yield Change("head precision", found, "[server] enable-fp32-lm-head", replace(now, head_dtype="bfloat16"))
    else:
        if config.model.fp8 == "off":
            yield Change("bf16 against float32", "float32 throughout", server, replace(now, dtype="float32"))
        if now.head_dtype is None:
            setting = "[server] enable-fp32-lm-head off, or train.log_prob_kernel = fused, whose logits are float32"
            yield Change("head precision", "logits in float32", setting, replace(now, head_dtype="float32"))


def _rope(rescorer: Rescorer, now: Reading) -> Iterator[Change]:
    base, scaling = read_rope(rescorer.hf_config)
    tried = [(other, scaling) for other in ROPE_BASES if other != base]
    tried += [] if scaling is None else [(base, None)]
    for other in tried:
        found = f"rotary base {other[0]:g}" if other[0] != base else "no rotary scaling"
        setting = f"config.json of model and server: rope_theta (here {base:g}), rope_scaling"
        yield Change("RoPE", found, setting, replace(now, rope=other))


def _stale(rounds: Sequence[SavedRound], now: Reading) -> Iterator[Change]:
    if now.weights == "learner":
        if any(played.stamped != {played.version} for played in rounds):
            setting = "[engine] async_steps = 0, stragglers; or [train] importance_sampling"
            yield Change("stale versions", "the versions that sampled", setting, replace(now, weights="stamps"))
        if any(max(played.stamped) for played in rounds):
            setting = "[sglang] verify_weights = true: a sync did not arrive"
            yield Change("stale versions", "one version before the stamped", setting, replace(now, weights="before"))
    if not now.has_stale_prefix and any(played.has_prefixes and max(played.stamped) for played in rounds):
        setting = "servers must flush their cache with new weights ([sglang] pause_mode = retract or abort)"
        yield Change("stale prefix cache", "keys of the version before", setting, replace(now, has_stale_prefix=True))
