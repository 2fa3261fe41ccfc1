"""Runs beside each other at equal cost, on numbers worked by hand."""

import json
import math

import pytest

from megatron_pz.errors import ReportError
from megatron_pz.report.comparison import budget, compare, half_interval, markdown, read_run
from megatron_pz.report.figure import draw, interpolated


def write_run(folder, *, tokens, scores, prompts=("A [mask].", "B [mask].")):
    """A run that scores every second step; `scores[i]` are the rewards of questions a, b at evaluation i."""
    folder.mkdir(parents=True)
    metrics, answers = [], []
    for evaluation, rewards in enumerate(scores):
        step = 2 * evaluation
        spent = {} if not step else {"tokens/generated": tokens, "tokens/packed": 3.0 * tokens, "time/step_s": 30.0}
        if step:
            metrics.append({"step": step - 1, **spent})
        metrics.append({"step": step, **spent, "time/eval_s": 10.0 if step else 0.0})
        metrics[-1]["eval/fixed_masks/accuracy"] = sum(rewards) / len(rewards)
        answers += [
            {"step": step, "set": "fixed_masks", "mask_id": f"q.{name}", "prompt": prompt, "reward": reward}
            for name, prompt, reward in zip("ab", prompts, rewards, strict=True)
        ]
    for name, rows in (("metrics.jsonl", metrics), ("eval.jsonl", answers)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path):
    """The dear variant spends 80 tokens between evaluations, the cheap one 40."""
    dear = [
        write_run(tmp_path / "dear" / "0", tokens=10.0, scores=[(0, 0), (1, 0), (1, 1)]),
        write_run(tmp_path / "dear" / "1", tokens=10.0, scores=[(0, 1), (1, 1), (1, 1)]),
    ]
    cheap = write_run(tmp_path / "cheap" / "0", tokens=5.0, scores=[(0, 0), (0, 1), (0, 1)])
    return [read_run("dear", 0, dear[0]), read_run("dear", 1, dear[1]), read_run("cheap", 0, cheap)]


def test_a_run_is_its_evaluations_with_what_they_cost(runs):
    assert [(p.step, p.generated, p.packed, p.cost, p.accuracy) for p in runs[0].points] == [
        (0, 0, 0, 0, 0.0),
        (2, 20, 60, 80, 0.5),
        (4, 40, 120, 160, 1.0),
    ]
    assert [point.seconds for point in runs[0].points] == [0, 50, 100]  # evaluations left out


def test_all_are_read_at_what_the_cheapest_had_spent(runs):
    assert budget(runs) == 80
    dear, cheap = compare(runs, "cheap")
    assert (dear.steps, cheap.steps) == (2, 4)
    assert (dear.generated, dear.packed) == (cheap.generated, cheap.packed) == (20, 60)
    # Question a: 1 and 1, question b: 0 and 1, over the two seeds.
    assert (dear.num_seeds, dear.before, dear.after, dear.lowest, dear.highest) == (2, 0.25, 0.75, 0.5, 1.0)
    deviation = math.sqrt(2 * 0.25**2)
    assert dear.interval == pytest.approx(1.96 * deviation / math.sqrt(2))
    # Against the cheap one: a gains 1 - 0, b gains 0.5 - 1.
    assert dear.gain == pytest.approx(0.25) and dear.gain_interval == pytest.approx(half_interval([1.0, -0.5]))
    assert cheap.gain is None and cheap.after == 0.5


def test_the_table_names_what_was_matched_and_the_reference(runs):
    text = markdown(compare(runs, "cheap"), 80, "fixed_masks")
    assert "at 80 tokens sampled and trained on" in text
    assert "| dear | 2 | 2 | 20 | 60 | 0.8 | 25.0% | 75.0% ± 49.0 | 50.0% to 100.0% | +25.0 ± 147.0 |" in text
    assert text.splitlines()[-1].endswith("| 50.0% to 50.0% | reference |")


def test_what_is_gained_beyond_format_is_told_where_one_is_paid_for_format_alone(runs, tmp_path):
    form = write_run(tmp_path / "form" / "0", tokens=5.0, scores=[(0, 0), (0.25, 0.75), (0.25, 0.75)])
    rows = compare([*runs, read_run("form", 0, form)], "cheap", format_control="form", unbudgeted={"form"})
    assert [row.beyond_format for row in rows] == [
        pytest.approx(0.25),
        0.0,
        None,
    ]  # a 1 - 0.25, b 0.5 - 0.75; 0.25 - 0.25
    assert rows[0].beyond_format_interval == pytest.approx(half_interval([0.75, -0.25]))
    assert rows[2].gain == pytest.approx(0.0)
    header, line, *cells = markdown(rows, 80, "fixed_masks").splitlines()[2:]
    assert header.endswith("| beyond format (95%) |") and header.count("|") == line.count("|")
    assert [cell.count("|") for cell in cells] == [header.count("|")] * 3
    assert cells[0].endswith("| +25.0 ± 147.0 | +25.0 ± 98.0 |") and cells[2].endswith(" ± 49.0 |  |")
    assert "by every run but those of form: at most so many." in markdown(rows, 80, "fixed_masks", {"form"})
    assert budget(runs, {"cheap"}) == 160  # it may stop early: 80 where it counts
    assert compare(runs, "dear", format_control="cheap", unbudgeted={"cheap"})[0].steps == 4
    with pytest.raises(ReportError, match="reference is 'form'"):
        compare(runs, "cheap", format_control="form")


def test_questions_in_other_words_are_no_part_of_a_gain_and_are_counted(runs, tmp_path):
    other = write_run(tmp_path / "other", tokens=5.0, scores=[(1, 1)] * 3, prompts=("A [mask].", "[mask] b [mask]."))
    rows = compare([*runs, read_run("other", 0, other)], "cheap")
    assert rows[2].after == 1.0 and rows[2].gain == 1.0  # a: 1 - 0; b is another question here
    assert [row.unlike for row in rows] == [0, 0, 1]
    text = markdown(rows, 80, "fixed_masks")
    assert "| +100.0 ± 0.0 (1 questions) |" in text
    assert text.endswith("\n\nother: 1 questions not put to the reference in the same words; its gain is over 1.\n")
    strange = write_run(tmp_path / "strange", tokens=5.0, scores=[(1, 1)] * 3, prompts=("C", "D"))
    rows = compare([*runs, read_run("strange", 0, strange)], "cheap")
    assert rows[2].gain is None and "| no question alike |" in markdown(rows, 80, "fixed_masks")


def test_a_reference_that_is_not_there_and_a_run_without_evaluations_are_named(runs, tmp_path):
    with pytest.raises(ReportError, match="reference is 'base'; it must be one of the variants: dear, cheap"):
        compare(runs, "base")
    (runs[2].folder / "eval.jsonl").unlink()
    with pytest.raises(ReportError, match=r"eval.jsonl has no answers to fixed_masks"):
        compare(runs, "dear")
    with pytest.raises(ReportError, match="no eval/held_out/accuracy.*--held-out-path"):
        read_run("dear", 0, runs[0].folder, "held_out")


def test_between_evaluations_the_figure_goes_straight(runs, tmp_path):
    assert [interpolated(runs[0], cost) for cost in (0, 40, 80, 120, 500)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    draw(runs, 80, tmp_path / "figure.svg", "fixed masks")
    assert "<svg" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.glob("*figure*")] == ["figure.svg"]
