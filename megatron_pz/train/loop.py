"""The main loop: one line a stage, in the order of the paper.

    corpus -> play (mask, predict, reward, advantages) -> deal (pack, schedule) -> learn (forward, loss, clip, update)
           -> sync (the engine samples from the new weights) -> evaluate -> journal -> checkpoint

Every rank runs it. Rank 0 plays and writes; the others decode for it and train with it.
"""

from __future__ import annotations

from megatron_pz.config.schema import Config
from megatron_pz.errors import DiskError, NumericsError
from megatron_pz.train.collector import collect
from megatron_pz.train.parts import Parts
from megatron_pz.train.state import RunState


def run(parts: Parts, config: Config, state: RunState) -> RunState:
    """Play and learn until `train_iters` steps are done, or a signal asks to stop. One step = one round = one batch.

    Returns:
        The state after the last completed step; it has been saved.

    Raises:
        NumericsError: a loss or gradient was not finite; nothing was changed, a dump that reproduces it was written, and
            the state after the step before it saved.
    """
    timers, last = parts.timers, config.train.train_iters
    if state.step == 0 and config.evaluate.eval_interval:
        with timers("eval"):
            scores = parts.evaluate(0)
        parts.journal.write(0, {}, None, None, scores, timers)
    while state.step < last:
        step = state.step + 1
        with timers("rollout"):
            played = parts.rounds.next(state)
        parts.memory.to_trainer()
        with timers("batch"):
            plans = parts.deal(played, step)
        try:
            with timers("train"):
                update = parts.learner.learn(plans, step)
        except NumericsError as error:
            # In the middle of a step there is no state to go on from; before the first, none worth keeping.
            if state.step and not parts.learner.is_mid_step:
                _rescue(parts, state, error)
            raise
        drawn = parts.rounds.num_begun(step)
        facts = {"epoch": parts.rounds.corpus.epoch(state.position), "num_paragraphs": float(drawn)}
        state = state.advance(drawn, updated=update.applied, left=played.left if played else ())
        with timers("sync"):
            parts.memory.to_engine()
            parts.engine.load(parts.trainer.chunks, state.policy_version)
        facts |= {**parts.memory.lap(), **parts.engine.lap()}
        scores = {}
        if config.evaluate.eval_interval and is_due(step, config.evaluate.eval_interval, last):
            with timers("eval"):
                scores = parts.evaluate(step)
        stop = parts.signals.agreed()
        parts.journal.write(step, facts, played, update, scores, timers)
        parts.settle(False)
        if stop or is_due(step, config.checkpoint.save_interval, last):
            with timers("checkpoint"):
                parts.save(state)
        collect()
        if stop:
            parts.tell(f"stopped by {stop} after step {step}; the same command goes on from there")
            break
    parts.settle(True)
    return state


def _rescue(parts: Parts, state: RunState, error: NumericsError) -> None:
    try:
        parts.rescue(state)
    except DiskError as fault:
        raise NumericsError(f"{error} The state before it could not be saved: {fault}") from error


def is_due(step: int, interval: int, last: int) -> bool:
    """True at every multiple of `interval` (0: at none) and at the last step.

    >>> [step for step in range(1, 8) if is_due(step, 3, 7)]
    [3, 6, 7]
    """
    return step == last or (interval > 0 and step % interval == 0)
