"""The table of metrics, and that everybody who measures keeps to it."""

import math
from pathlib import Path

import pytest
from metric_ranges import out_of_range

from megatron_pz.errors import ReportError
from megatron_pz.report.metrics import METRICS, TABLE, check
from megatron_pz.report.reference import markdown

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"

ASKED_FOR = """step loss grad_norm lr num_surviving_groups reward/mask/mean reward/prediction/mean mask/valid_rate
mask/stop_word_share eval/fixed_masks/accuracy eval/held_out/accuracy mismatch_kl time/rollout_s time/train_s
tokens/completion entropy/mask entropy/prediction entropy memory/rss_bytes epoch num_paragraphs""".split()


def test_every_metric_that_was_asked_for_is_known():
    check(ASKED_FOR)


def test_names_are_there_once_and_rows_are_complete():
    names = [row.name for row in TABLE]
    assert len(names) == len(set(names))
    for row in METRICS.values():
        assert row.unit and row.meaning and row.section, row
        assert row.low < row.high, row
        assert "<" not in row.name, row


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ReportError, match=r"mask/valid_rat \(did you mean mask/valid_rate\?\)"):
        check({"loss": 1.0, "mask/valid_rat": 0.5})
    with pytest.raises(ReportError, match="Unknown metric zzzz. Give it a row"):
        check(["zzzz"])


def test_values_that_cannot_be_are_named():
    assert out_of_range({"mask/valid_rate": 1.0, "grad_norm": 0.0, "loss": -5.0, "entropy": None}) == []
    assert out_of_range({"mask/valid_rate": -0.5}) == ["mask/valid_rate is -0.5, range 0 to 1"]
    assert out_of_range({"loss": math.nan}) == ["loss is nan, range -inf to inf"]


def test_the_page_of_metrics_is_that_of_the_table():
    assert DOCS.read_text(encoding="utf-8") == markdown(), (
        "run .venv/bin/python -m megatron_pz.report --list-metrics > docs/metrics.md"
    )
