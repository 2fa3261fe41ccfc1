"""Every metric of a run: name, unit, range, meaning. `docs/metrics.md` is made from this table (`report/reference.py`).

A name that is not in it is refused, so that a curve cannot be lost to a slip of the pen. `<role>` stands for `mask` and
`prediction`, `<set>` for `fixed_masks`, `held_out` and `shuffled`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megatron_pz.errors import ReportError
from megatron_pz.types import Role

_INF = math.inf
_PLACES = {"<role>": tuple(str(role) for role in Role), "<set>": ("fixed_masks", "held_out", "shuffled")}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row: values lie in `low`..`high`, both included."""

    name: str
    unit: str
    low: float
    high: float
    meaning: str
    section: str = ""


def _rows(section: str, *rows: tuple[str, str, float, float, str]) -> tuple[Metric, ...]:
    return tuple(Metric(*row, section) for row in rows)


TABLE: tuple[Metric, ...] = (
    *_rows(
        "Progress",
        ("step", "updates", 0, _INF, "optimizer updates done; 0 is the score before the first"),
        ("epoch", "passes", 0, _INF, "passes over the corpus when the step's paragraphs were drawn"),
        ("num_paragraphs", "paragraphs", 0, _INF, "paragraphs drawn for the step"),
        ("rounds/paragraphs_cut", "paragraphs", 0, _INF, "paragraphs of the round that were given up as stragglers"),
        ("rounds/requests_aborted", "requests", 0, _INF, "requests of theirs that were under way"),
        ("rounds/paragraphs_continued", "paragraphs", 0, _INF, "stragglers that go on in the next round"),
    ),
    *_rows(
        "Rewards",
        ("reward/mask/mean", "reward", 0, 1, "mean reward of mask rollouts, invalid ones included (0)"),
        (
            "reward/prediction/mean",
            "reward",
            -1,
            1,
            "mean reward of predictions: accuracy on the masks of this round; `format_only`: share that is paid; "
            "`rlvr`: what answers are paid",
        ),
        ("verifier/right_share", "share", 0, 1, "`rlvr`: verified answers that are right"),
        ("verifier/unverified_share", "share", 0, 1, "`rlvr`: responses left out since no verifier gave a verdict"),
        ("verifier/length_penalty", "reward", 0, 1, "`rlvr`: mean loss of right answers for their length"),
    ),
    *_rows(
        "Masks",
        ("mask/valid_rate", "share", 0, 1, "mask rollouts whose span can be hidden"),
        ("mask/reject/truncated", "rollouts", 0, _INF, "rejected: the response was cut off at its token limit"),
        ("mask/reject/aborted", "rollouts", 0, _INF, "rejected: the engine gave the response up"),
        ("mask/reject/no_mask", "rollouts", 0, _INF, "rejected: no mask is named"),
        ("mask/reject/empty", "rollouts", 0, _INF, "rejected: nothing stands between the braces"),
        ("mask/reject/forbidden_text", "rollouts", 0, _INF, "rejected: the span holds [mask], a backslash, a brace"),
        ("mask/reject/not_in_paragraph", "rollouts", 0, _INF, "rejected: the span does not occur in the paragraph"),
        ("mask/reject/too_many_occurrences", "rollouts", 0, _INF, "rejected: the span occurs too often"),
        ("mask/reject/whole_paragraph", "rollouts", 0, _INF, "rejected: the span is the whole paragraph"),
        ("mask/reject/too_long", "rollouts", 0, _INF, "rejected: the span is too large a share of the paragraph"),
        ("mask/reject/partial_word", "rollouts", 0, _INF, "rejected: the span cuts a word (mask_validity whole_words)"),
        ("mask/reject/prompt_too_long", "rollouts", 0, _INF, "rejected: the prediction prompt would not fit"),
        ("mask/length_chars", "characters", 1, _INF, "mean length of the hidden text, over masks that were predicted"),
        ("mask/length_words", "words", 0, _INF, "mean length of the hidden text, over masks that were predicted"),
        ("mask/occurrences", "places", 1, _INF, "mean number of times the hidden text stands in its paragraph"),
        ("mask/stop_word_share", "share", 0, 1, "masks that hide function words only (English)"),
        ("mask/whole_word_share", "share", 0, 1, "masks that cut no word"),
        ("mask/distinct_share", "share", 0, 1, "different answers among a paragraph's valid masks, mean of paragraphs"),
        (
            "mask/lottery_share",
            "share",
            0,
            1,
            "masks of one character, of digits, or of function words alone (English)",
        ),
        (
            "mask/visible_share",
            "share",
            0,
            1,
            "masks whose words still stand in the masked text in another case, or inflected (an estimate by stems)",
        ),
    ),
    *_rows(
        "Predictions",
        ("prediction/format_rate", "share", 0, 1, "predictions with an answer in a box"),
        ("prediction/near_miss_rate", "share", 0, 1, "predictions wrong by case, punctuation or spacing alone"),
    ),
    *_rows(
        "Groups",
        (
            "groups/all_wrong_share",
            "share",
            0,
            1,
            "prediction groups in which nobody was right (`format_only`: nobody could be read)",
        ),
        (
            "groups/all_right_share",
            "share",
            0,
            1,
            "prediction groups in which everybody was right (`format_only`: could be read)",
        ),
        (
            "groups/one_right_share",
            "share",
            0,
            1,
            "prediction groups of four or more in which one alone was right: by chance, most often",
        ),
        ("groups/kept_share/<role>", "share", 0, 1, "groups of the role whose rewards differ"),
        (
            "groups/duplicate_share/<role>",
            "share",
            0,
            1,
            "responses that say, token for token, what another of their group said before",
        ),
        ("num_surviving_groups", "groups", 0, _INF, "groups of both roles that the update learns from"),
    ),
    *_rows(
        "Tokens",
        ("tokens/completion", "tokens", 0, _INF, "mean length of a response"),
        ("tokens/completion/<role>", "tokens", 0, _INF, "mean length of a response of the role"),
        ("truncated_share/<role>", "share", 0, 1, "responses of the role cut off at the token limit"),
        ("tokens/generated", "tokens", 0, _INF, "response tokens of the round, all rollouts"),
        ("tokens/trained", "tokens", 0, _INF, "tokens with a loss weight, over all ranks"),
        ("tokens/packed", "tokens", 0, _INF, "tokens through the trainer: prompts, responses and padding, all ranks"),
    ),
    *_rows(
        "Servers",
        ("engine/retries", "requests", 0, _INF, "asked again after a fault, since the last record"),
        ("engine/aborted", "requests", 0, _INF, "given up by a server when weights arrived, and asked again"),
        ("engine/servers_lost", "servers", 0, _INF, "times that a server was lost, since the last record"),
        ("engine/servers_live", "servers", 0, _INF, "that answer at the end of the step"),
    ),
    *_rows(
        "Update",
        ("loss", "nats a token", -_INF, _INF, "policy loss (paper Eq. 11), or negative log-likelihood of plain text"),
        ("loss/<role>", "nats a token", -_INF, _INF, "the role's part of `loss`; the two add up to it"),
        ("grad_norm", "norm", 0, _INF, "global gradient norm before clipping"),
        (
            "grad_share/mask",
            "share",
            0,
            1,
            "mask generation's share of the squared gradient at the sampled tokens' own logits, no gradient of weights "
            "(`train/loss.py:logit_pull`); left out where a role has no trained token",
        ),
        ("lr", "1", 0, _INF, "learning rate of the update"),
        ("entropy", "nats", 0, _INF, "mean entropy of the policy on trained tokens"),
        ("entropy/<role>", "nats", 0, _INF, "mean entropy of the policy on the role's trained tokens"),
        ("mismatch_kl", "nats", 0, _INF, "KL of engine and trainer on sampled tokens (k3)"),
        ("mismatch/max_abs", "nats", 0, _INF, "largest difference of a token's log-prob, engine against trainer"),
        (
            "mismatch/clipped_share",
            "share",
            0,
            1,
            "trained tokens whose importance weight is cut, or that are left out",
        ),
        ("mismatch/replayed_share", "share", 0, 1, "trained tokens whose experts the server chose"),
        ("staleness/mean", "updates", 0, _INF, "updates between the weights that sampled a token and those that learn"),
        ("staleness/max", "updates", 0, _INF, "the same of the oldest token"),
        ("clip_fraction", "share", 0, 1, "trained tokens whose ratio was clipped"),
        ("ratio/mean", "ratio", 0, _INF, "mean ratio that is clipped: policy to old log-probs, of engine or trainer"),
        ("ref_kl", "nats", 0, _INF, "KL to the initial policy on trained tokens (k3)"),
        ("token_share/mask", "share", 0, 1, "mask generation's share of the trained tokens"),
    ),
    *_rows(
        "Alarms",
        (
            "alarms/sounding",
            "alarms",
            0,
            _INF,
            "alarms that sound after this record; which, and what to do, says the page",
        ),
    ),
    *_rows(
        "Evaluation",
        ("eval/<set>/accuracy", "share", 0, 1, "questions answered exactly; the same questions every time"),
        ("eval/<set>/format_rate", "share", 0, 1, "answers that stand in a box"),
    ),
    *_rows(
        "Time and memory",
        ("time/rollout_s", "seconds", 0, _INF, "playing the round"),
        ("time/score_s", "seconds", 0, _INF, "old and reference log-probs"),
        ("time/batch_s", "seconds", 0, _INF, "packing and handing out micro-batches"),
        ("time/train_s", "seconds", 0, _INF, "forward, backward and update"),
        ("time/sync_s", "seconds", 0, _INF, "handing the weights to the engine"),
        ("time/eval_s", "seconds", 0, _INF, "fixed masks"),
        (
            "time/checkpoint_s",
            "seconds",
            0,
            _INF,
            "saving (or copying, with async_save) after the step before this one",
        ),
        ("time/step_s", "seconds", 0, _INF, "from the last record to this one, all phases and what is between them"),
        (
            "memory/trainer_asleep_bytes",
            "bytes",
            0,
            _INF,
            "the trainer's memory on its device at the end of play, rank 0",
        ),
        ("memory/trainer_awake_bytes", "bytes", 0, _INF, "the same at the end of the update"),
        ("memory/peak_play_bytes", "bytes", 0, _INF, "most memory of the trainer on its GPU during play, rank 0"),
        ("memory/peak_update_bytes", "bytes", 0, _INF, "the same from the end of play to the end of the update"),
        ("memory/peak_sync_bytes", "bytes", 0, _INF, "the same while the weights are handed to the engine"),
        ("memory/rss_bytes", "bytes", 0, _INF, "resident memory of rank 0's process"),
    ),
)
"""All metrics, in the order of `docs/metrics.md`."""


_SCORED = "steps that score; `held_out` where held_out_path is set, `shuffled` with probe_shuffled"
WHEN: Mapping[str, str] = {
    "entropy": "tasks continue_pt and sft",
    "ref_kl": "kl_coef above 0",
    "mismatch/clipped_share": "importance_sampling truncated or masked",
    "mismatch/replayed_share": "sglang with routing_replay",
    "verifier/right_share": "task rlvr",
    "verifier/unverified_share": "task rlvr",
    "verifier/length_penalty": "task rlvr",
    "eval/<set>/accuracy": _SCORED,
    "eval/<set>/format_rate": _SCORED,
    "engine/retries": "engine sglang",
    "engine/aborted": "engine sglang",
    "engine/servers_lost": "engine sglang",
    "engine/servers_live": "engine sglang",
    "memory/trainer_asleep_bytes": "sglang.colocate",
    "memory/trainer_awake_bytes": "sglang.colocate",
    "memory/peak_play_bytes": "on a GPU",
    "memory/peak_update_bytes": "on a GPU",
    "memory/peak_sync_bytes": "on a GPU",
    "rounds/paragraphs_cut": "sglang with stragglers cut",
    "rounds/requests_aborted": "sglang with stragglers cut",
    "rounds/paragraphs_continued": "sglang with stragglers continue",
    "time/score_s": "kl_coef above 0, recompute_old_log_probs, or several updates a batch",
    "time/eval_s": "steps that score",
    "time/checkpoint_s": "steps after one that saved, and while a checkpoint is written in the background",
}
"""Rows that a run may go without, however much happens in it, and what brings them about."""


def _expand(metric: Metric) -> tuple[Metric, ...]:
    for place, values in _PLACES.items():
        if place in metric.name:
            return tuple(replace(metric, name=metric.name.replace(place, value)) for value in values)
    return (metric,)


METRICS: Mapping[str, Metric] = {concrete.name: concrete for row in TABLE for concrete in _expand(row)}
"""The same by name, places filled in."""


def check(metrics: Iterable[str]) -> None:
    """Pass if every name is in the table.

    Raises:
        ReportError: names the strangers, and for each the nearest known name.

    >>> check({"loss": 0.1, "step": 3})
    >>> check(["mask/validrate"])
    Traceback (most recent call last):
    megatron_pz.errors.ReportError: Unknown metric mask/validrate (did you mean mask/valid_rate?). Give it a row ...
    """
    strangers = [name for name in metrics if name not in METRICS]
    if strangers:
        raise ReportError(
            f"Unknown metric {', '.join(map(_with_nearest, strangers))}. "
            "Give it a row in megatron_pz/report/metrics.py (name, unit, range, meaning), or correct the name."
        )


def _with_nearest(name: str) -> str:
    nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
    return f"{name} (did you mean {nearest[0]}?)" if nearest else name
