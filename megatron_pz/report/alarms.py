"""Alarms: what can go wrong in the game without an error, how a run's metrics show it, and what to do (docs/paper.md 11).

An alarm sounds while the mean of a metric over its last records is past a limit, for one of its signs. Which of them
sound is a function of the rows of `metrics.jsonl` alone, so a run that was continued and the page say the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Sign:
    """`metric` past `limit`; with `of`, the ratio of the two means, where that of `of` is `least` or more."""

    metric: str
    side: Literal["over", "under"]
    limit: float
    of: str = ""
    least: float = 0.0

    def __str__(self) -> str:
        """As the page and docs/metrics.md have it.

        >>> str(Sign("mask/valid_rate", "under", 0.25)), str(Sign("a", "over", 0.75, of="b"))
        ('mask/valid_rate under 0.25', 'a / b over 0.75')
        """
        return f"{self.metric}{f' / {self.of}' if self.of else ''} {self.side} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Alarm:
    """What can go wrong with the game, how it shows, and what to do."""

    name: str
    signs: tuple[Sign, ...]  # each alone is enough
    num_records: int  # with the metric, that the mean is taken over
    meaning: str
    action: str


ALARMS: tuple[Alarm, ...] = (
    Alarm(
        "lottery_masks",
        (Sign("mask/lottery_share", "over", 0.6), Sign("groups/one_right_share", "over", 0.3)),
        5,
        "The generator hides what luck can guess (a digit, a letter, a function word) or what one of a group hits by chance: "
        "that pays best and teaches nothing.",
        "Read the masks on the page. Try --mask-validity whole_words, a mask template that asks for names and concepts, more "
        "predictions a mask; watch eval/*/accuracy, not rewards.",
    ),
    Alarm(
        "near_misses",
        (Sign("prediction/near_miss_rate", "over", 0.05),),
        5,
        "Predictions are wrong by case, punctuation or spacing alone: the difficulty is one of form, and the generator is "
        "paid for it.",
        "Set --match casefold, or say in the prediction template that the words are wanted as they stood.",
    ),
    Alarm(
        "fragments",
        (Sign("mask/whole_word_share", "under", 0.5),),
        5,
        "Most masks cut words: where the cut falls cannot be known from the context.",
        "Set --mask-validity whole_words. The paper's own recipe lets fragments pass and found the filter no better, so "
        "a run without growing scores is reason, this alarm alone is not.",
    ),
    Alarm(
        "invalid_masks",
        (Sign("mask/valid_rate", "under", 0.25),),
        5,
        "Few masks can be hidden at all (mask/reject/* has the reasons): whole paragraphs, echoes of the prompt, or no mask.",
        "Look at the responses. Try another mask template, examples in it, `warm_up_task` random_span, a larger "
        "--max-response-tokens.",
    ),
    Alarm(
        "generator_collapse",
        (Sign("mask/distinct_share", "under", 0.3), Sign("groups/duplicate_share/mask", "over", 0.7)),
        5,
        "The masks of a paragraph are nearly all the same: rewards hardly differ, and the generator explores no more.",
        "Set --temperature 1, raise --eps-clip-high, lower --lr; go back to a checkpoint before entropy/mask fell.",
    ),
    Alarm(
        "flat_groups",
        (
            Sign("groups/kept_share/prediction", "under", 0.1),
            Sign("groups/kept_share/mask", "under", 0.1),
            Sign("num_surviving_groups", "under", 1.0),
        ),
        5,
        "Nearly all groups are flat, all right or all wrong (groups/all_*): nothing is learned from them, and the step is spent.",
        "All wrong: --warm-up-task random_span, simpler text, a larger --max-response-tokens. All right: harder text. Both: "
        "more rollouts a group.",
    ),
    Alarm(
        "visible_answer",
        (Sign("mask/visible_share", "over", 0.25),),
        5,
        "The hidden words still stand in the text in another case, or inflected: the question is answered by copying.",
        "Look for such masks on the page. Say in the mask template that the words must stand nowhere else; with "
        "--mask-validity one_mask, take default.",
    ),
    Alarm(
        "shuffled_context",
        (Sign("eval/shuffled/accuracy", "over", 0.75, of="eval/fixed_masks/accuracy", least=0.1),),
        2,
        "With the words of the text shuffled nearly as many questions are answered: the policy knows these texts by heart, "
        "or guesses from the words alone, and does not read.",
        "Judge by eval/held_out/accuracy, of texts that were written after the model was trained; take such texts for the corpus too.",
    ),
    Alarm(
        "truncation",
        (Sign("truncated_share/prediction", "over", 0.1), Sign("truncated_share/mask", "over", 0.1)),
        3,
        "Responses reach the token limit, and count as wrong: they grow, or a base model does not end its turn.",
        "Read their ends on the page. If they never end: stop tokens (generation_config.json), the chat template. If they "
        "think on: a larger --max-response-tokens.",
    ),
)
"""In the order of docs/metrics.md and the page."""


@dataclass(frozen=True, slots=True)
class State:
    """How an alarm stands after the rows that were seen."""

    alarm: Alarm
    values: Mapping[Sign, float]  # the means; a sign without enough records has none
    sounding: tuple[Sign, ...]
    first: int | None  # step at which it sounded first; None: never
    last: int | None  # step at which it sounded last

    @property
    def word(self) -> Literal["sounds", "sounded", "silent", "not measured"]:
        if self.sounding:
            return "sounds"
        return "sounded" if self.first is not None else "silent" if self.values else "not measured"


class Watch:
    """Follows a run by its rows, in the order of their steps.

    >>> watch = Watch()
    >>> [[state.alarm.name for state in watch.see({"step": s, "truncated_share/mask": 0.5})] for s in range(1, 5)]
    [[], [], ['truncation'], []]
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._records: dict[Sign, deque[tuple[float, float]]] = {
            sign: deque(maxlen=alarm.num_records) for alarm in ALARMS for sign in alarm.signs
        }
        self._sounded: dict[str, tuple[int, int]] = {}
        for row in rows:
            self.see(row)

    def see(self, row: Mapping[str, Any]) -> list[State]:
        """Take in a row of `metrics.jsonl`; the alarms that sound at it for the first time."""
        for sign, records in self._records.items():
            found = (row.get(sign.metric), row.get(sign.of) if sign.of else 1.0)
            if all(isinstance(value, (int, float)) for value in found):
                records.append(found)  # type: ignore[arg-type]
        fresh, step = [], int(row["step"])
        for state in self.states():
            if state.sounding:
                name = state.alarm.name
                if name not in self._sounded:
                    fresh.append(state)
                self._sounded[name] = (self._sounded.get(name, (step, step))[0], step)
        return fresh

    def states(self) -> list[State]:
        """Of every alarm, in the order of `ALARMS`."""
        return [self._state(alarm) for alarm in ALARMS]

    def num_sounding(self) -> int:
        return sum(bool(state.sounding) for state in self.states())

    def _state(self, alarm: Alarm) -> State:
        means = {sign: _mean(sign, self._records[sign], alarm.num_records) for sign in alarm.signs}
        values = {sign: value for sign, value in means.items() if value is not None}
        sounding = tuple(sign for sign, value in values.items() if _is_past(sign, value))
        first, last = self._sounded.get(alarm.name, (None, None))
        return State(alarm, values, sounding, first, last)


def told(state: State, step: int) -> str:
    """A sounding alarm in a line, for the console."""
    signs = ", ".join(
        f"{sign} (mean of {state.alarm.num_records} records: {state.values[sign]:.3g})" for sign in state.sounding
    )
    return f"alarm {state.alarm.name} at step {step}: {signs}. {state.alarm.meaning} What to do: {state.alarm.action}"


def _mean(sign: Sign, records: Sequence[tuple[float, float]], num_records: int) -> float | None:
    if len(records) < num_records:
        return None
    value, base = fmean(value for value, _ in records), fmean(base for _, base in records)
    return value / base if base > 0 and base >= sign.least else None


def _is_past(sign: Sign, value: float) -> bool:
    return value > sign.limit if sign.side == "over" else value < sign.limit
