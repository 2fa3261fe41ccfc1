"""What the main loop works with, each part ready to use. Made by `train.launch`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_pz.engine.base import Engine
from megatron_pz.report.timers import Timers
from megatron_pz.train.journal import RunJournal
from megatron_pz.train.learn import Learner
from megatron_pz.train.memory import Memory
from megatron_pz.train.play import Round, Rounds
from megatron_pz.train.signals import StopSignals
from megatron_pz.train.state import RunState
from megatron_pz.train.step import Trainer
from megatron_pz.types import UpdatePlan


@dataclass(frozen=True)
class Parts:
    """All of them, by the stage of the loop that they serve."""

    rounds: Rounds
    deal: Callable[[Round | None, int], list[UpdatePlan]]
    learner: Learner
    trainer: Trainer
    engine: Engine
    memory: Memory
    evaluate: Callable[[int], Mapping[str, float]]
    journal: RunJournal
    save: Callable[[RunState], None]
    settle: Callable[[bool], None]  # lets a checkpoint that is written in the background appear; True: waits for it
    rescue: Callable[[RunState], None]  # saves beside all older checkpoints, unless that step is saved already
    signals: StopSignals
    tell: Callable[[str], None]  # shows the user a line
    timers: Timers
