"""`docs/metrics.md`, made of the tables of metrics and alarms, and of what a healthy run's values are."""

from __future__ import annotations

import math
from collections.abc import Iterable

from megatron_pz.report.alarms import ALARMS
from megatron_pz.report.metrics import METRICS, TABLE, WHEN, Metric

_RUN = "../benchmarks/records/healthy_demo"
_INTRODUCTION = """# Metrics

One object a step in `metrics.jsonl` of the run directory; TensorBoard and W&B have the same names.
A metric that has nothing to speak of in a step (no prediction was made, nothing was learned) is left out, and
so is one whose condition, after `Only:`, does not hold. The tasks `continue_pt` and `sft` generate nothing and
have no rewards, masks, predictions and groups.
`<role>` is `mask` (mask generation) or `prediction` (mask prediction). `<set>` is `fixed_masks` (random
masks on texts of the corpus), `held_out` (on texts that are never trained on) or `shuffled` (`fixed_masks` with the
words of their texts in an order of chance).

This page is made by `python -m megatron_pz.report --list-metrics` from `megatron_pz/report/metrics.py`, `alarms.py` and
`reference.py`."""

_ALARMS = """An alarm sounds while the mean of the metric over that many of its last records is past the limit; a record
without the metric does not count. Where two signs stand, each alone is enough. It is told on the console when it first sounds,
counted in `alarms/sounding`, and stands on the page with its state. It changes nothing in the run. The limits are ours: away
from what the demo's healthy run shows, so that what sounds is worth a look; slower or smaller faults do not sound."""

_HEALTHY = f"""As a rule of thumb, ours, from this project's runs of small models and from the paper's settings; larger
models have not been seen with this code. A healthy run of the demo has [these values]({_RUN}.md), and the plots below are of it."""

HEALTHY: tuple[tuple[str, str, str], ...] = (
    ("mask/valid_rate", "above 0.8 after some hundred steps, rising", "`mask/reject/*` has the reasons"),
    ("reward/prediction/mean", "0.25 to 0.6, level: masks get harder as the policy gets better", "see `groups/*`"),
    ("reward/mask/mean", "0.2 to 0.6", "near 0: masks are invalid, too easy or hopeless; `groups/*` tells which"),
    ("groups/kept_share/prediction", "above 0.5", "all wrong: easier text or a warm-up; all right: harder text"),
    ("groups/kept_share/mask", "above 0.8", "masks of a paragraph are equal, or all worth 0"),
    ("groups/one_right_share", "below 0.2; even odds over all accuracies give 0.11 with 8 predictions", "luck"),
    ("groups/duplicate_share/mask", "below 0.5", "`--temperature 1`, `--eps-clip-high`"),
    ("groups/duplicate_share/prediction", "any for answers alone; near 0 where it reasons", "read the responses"),
    ("mask/distinct_share", "above 0.6", "the generator collapses: see its alarm"),
    ("mask/lottery_share", "below 0.3; high in the demo, whose masks are single words", "read the masks"),
    ("mask/visible_share", "below 0.1", "see its alarm"),
    ("mask/whole_word_share", "above 0.8; the default rule lets fragments pass", "`--mask-validity whole_words`"),
    ("prediction/format_rate", "above 0.95 after some tens of steps", "template, stop tokens, token limit"),
    ("prediction/near_miss_rate", "below 0.02", "`--match casefold`"),
    ("truncated_share/prediction", "below 0.02", "`--max-response-tokens`, stop tokens"),
    ("entropy/mask", "falls slowly, never near 0", "collapse: lower `--lr`, raise `--eps-clip-high`"),
    ("entropy/prediction", "falls slowly; a rise to several nats is noise", "lower `--lr`"),
    ("grad_norm", "within a few times its first values; clipped at 1", "lower `--lr`, look at `mismatch_kl`"),
    ("clip_fraction", "0 with one update a batch, below 0.05 with several", "fewer updates a batch, lower `--lr`"),
    (
        "mismatch_kl",
        "below 1e-6 in float32, below 1e-2 in bfloat16",
        "`--importance-sampling`, versions, temperature",
    ),
    ("token_share/mask", "about 1 / (1 + predictions a mask) of equal lengths, 0.1 to 0.3", "`--generator-weight`"),
    ("grad_share/mask", "0.05 to 0.6", "near 0: the generator learns nothing beside; `--generator-weight`"),
)
"""(metric, healthy, when it is not)."""


def markdown() -> str:
    """The page."""
    lines = [_INTRODUCTION]
    section = ""
    for row in TABLE:
        if row.section != section:
            section = row.section
            lines += ["", f"## {section}", *_head("name", "unit", "range", "meaning")]
        meaning = row.meaning + (f". Only: {WHEN[row.name]}" if row.name in WHEN else "")
        lines.append(_line(f"`{row.name}`", row.unit, _range(row), meaning))
    lines += [
        "",
        "## What alarms mean",
        _ALARMS,
        *_head("alarm", "sounds when", "records", "meaning", "what to do"),
    ]
    for alarm in ALARMS:
        signs = "; ".join(f"`{sign}`" for sign in alarm.signs)
        lines.append(_line(f"`{alarm.name}`", signs, str(alarm.num_records), alarm.meaning, alarm.action))
    lines += ["", "## Healthy ranges", "", _HEALTHY, *_head("name", "healthy", "when it is not")]
    for name, healthy, action in HEALTHY:
        assert name in METRICS, name
        lines.append(_line(f"`{name}`", healthy, action))
    lines += ["", *(f"![{title}]({_RUN}_{name}.svg)" for name, title in PLOTS)]
    return "\n".join(lines) + "\n"


PLOTS = (
    ("game", "Groups and masks of the demo's run"),
    ("roles", "Entropy, tokens and gradient by role of the demo's run"),
)
"""Of the recorded run: file, what it shows."""


def _head(*names: str) -> Iterable[str]:
    return ("", f"| {' | '.join(names)} |", "|" + "---|" * len(names))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _range(row: Metric) -> str:
    low = "" if row.low == -math.inf else f"{row.low:g}"
    high = "" if row.high == math.inf else f"{row.high:g}"
    return f"{low} to {high}" if low and high else f"from {low}" if low else "any"
