"""What a run says while it runs: one line a step, a progress bar with the time left, and now and then a game.

On a terminal the lines have colour and a bar stands below them; elsewhere they are plain text. The journal is the
truth, this is a view of it. Text of the corpus and of the policy is shown as it is: markup in it means nothing, and
control characters are made visible.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TextIO

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from megatron_pz.report.games import Game, games_of
from megatron_pz.report.verdicts import verdicts
from megatron_pz.types import Group, Rollout

_ROLE_STYLE = {"mask": "yellow", "prediction": "cyan"}
_JOINERS = "\u200c\u200d"  # hold letters and emoji together
_STEPS_OF_ETA = 20  # enough to even out evaluations, few enough to follow a change


class Console:
    """The run's console. Only rank 0 makes one that is `enabled`; the others are silent.

    Args:
        train_iters: steps in all.
        step: steps done before.
        stream: default standard output.
        is_terminal: default: what `stream` says.
    """

    def __init__(
        self,
        train_iters: int,
        step: int = 0,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        is_terminal: bool | None = None,
    ) -> None:
        file = stream if stream is not None else sys.stdout
        self.is_terminal = file.isatty() if is_terminal is None else is_terminal
        self.train_iters = train_iters
        self._seconds: deque[float] = deque(maxlen=_STEPS_OF_ETA)
        self._console = rich.console.Console(
            file=file,
            force_terminal=self.is_terminal,
            quiet=not enabled,
            highlight=False,
            # A line in a file is as long as it is; rich would wrap it at 80 columns.
            width=None if self.is_terminal else 10_000,
        )
        self._progress = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
            disable=not (enabled and self.is_terminal),
            expand=True,
        )
        self._bar = self._progress.add_task("steps", total=train_iters, completed=step, eta="")

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line on `step`, out of what `metrics` has of names in `report.metrics`."""
        if step > 0 and "time/step_s" in metrics:
            self._seconds.append(metrics["time/step_s"])
        eta = self._eta(step)
        self._progress.update(self._bar, completed=step, eta=eta)
        self._console.print(step_line(step, self.train_iters, metrics, "" if self.is_terminal else eta), soft_wrap=True)

    def message(self, text: str) -> None:
        """One line of plain text, e.g. where a checkpoint was written."""
        self._console.print(Text(visible(text)), soft_wrap=True)

    def show_games(self, groups: Sequence[Group], num_paragraphs: int, task: str) -> None:
        """The first `num_paragraphs` paragraphs of a round of `task`: each with one mask and the predictions for it."""
        for game in games_of(groups)[:num_paragraphs]:
            text = game_text(game, not self.is_terminal, verdicts(task))
            self._console.print(text, soft_wrap=not self.is_terminal)

    def close(self) -> None:
        """Take the bar away; lines stay."""
        self._progress.stop()

    def _eta(self, step: int) -> str:
        left = self.train_iters - step
        if not self._seconds or left <= 0:
            return ""
        return f"{duration(left * sum(self._seconds) / len(self._seconds))} left"


def step_line(step: int, train_iters: int, metrics: Mapping[str, float], eta: str = "") -> Text:
    """The line of a step; what `metrics` has not is left out.

    >>> str(step_line(3, 40, {"reward/mask/mean": 0.5, "mask/valid_rate": 0.9, "grad_norm": 1.25}))
    'step  3/40  reward mask 0.500  valid 90%  grad 1.25'
    """
    line = Text(f"step {step:>{len(str(train_iters))}}/{train_iters}")
    for role, style in _ROLE_STYLE.items():
        if (value := metrics.get(f"reward/{role}/mean")) is not None:
            _add(line, f"{'reward ' if 'reward' not in line.plain else ''}{role} {value:.3f}", style)
    shown = (
        ("fixed masks", "eval/fixed_masks/accuracy", "{:.1%}", "bold green"),
        ("held out", "eval/held_out/accuracy", "{:.1%}", "green"),
        ("valid", "mask/valid_rate", "{:.0%}", ""),
        ("stop words", "mask/stop_word_share", "{:.0%}", ""),
        ("groups", "num_surviving_groups", "{:.0f}", ""),
        ("tokens", "tokens/completion", "{:.1f}", ""),
        ("loss", "loss", "{:.4f}", ""),
        ("grad", "grad_norm", "{:.3g}", ""),
        ("rollout", "time/rollout_s", "{:.1f}s", "dim"),
        ("train", "time/train_s", "{:.1f}s", "dim"),
    )
    for label, name, form, style in shown:
        if (value := metrics.get(name)) is not None:
            _add(line, f"{label} {form.format(value)}", style)
    if eta:
        _add(line, eta, "dim")
    return line


def game_text(game: Game, marks: bool, words: tuple[str, str]) -> Text:
    """A paragraph with its chosen mask highlighted, the predictions below.

    Args:
        marks: put [[ ]] around hidden words, where there is no colour to show them.
        words: for a prediction that is paid, and for one that is not.
    """
    text = Text("\n")
    text.append(f"{visible(game.paragraph_id)}  ", "dim")
    done = 0
    for start, end in game.spans:
        text.append(visible(game.text[done:start]))
        text.append(f"[[{visible(game.text[start:end])}]]" if marks else visible(game.text[start:end]), "bold reverse")
        done = end
    text.append(visible(game.text[done:]))
    if game.mask is not None:
        text.append("\n  mask       ", _ROLE_STYLE["mask"])
        text.append(f"{visible(game.mask.response.strip())}  reward {game.mask.reward:.3f}")
        if game.mask.reject_reason:
            text.append(f"  rejected: {game.mask.reject_reason}", "red")
    for rollout in game.predictions:
        text.append("\n  prediction ", _ROLE_STYLE["prediction"])
        text.append_text(_prediction(rollout, words))
    return text


def _prediction(rollout: Rollout, words: tuple[str, str]) -> Text:
    is_paid = rollout.reward > 0
    said = visible(rollout.response.strip())
    return Text.assemble((f"{words[not is_paid]}  ", "green" if is_paid else "red"), said)


def _add(line: Text, text: str, style: str = "") -> None:
    line.append("  ").append(text, style)


def visible(text: str) -> str:
    """`text` on one line, with control characters (which could drive a terminal) shown as a middle dot.

    >>> visible("one\\ntwo\\x1b[31m")
    'one two·[31m'
    """
    return "".join(" " if c.isspace() else c if c.isprintable() or c in _JOINERS else "·" for c in text)


def duration(seconds: float) -> str:
    """Seconds in words of a clock.

    >>> duration(8.4), duration(200), duration(7260)
    ('8s', '3m20s', '2h01m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"
