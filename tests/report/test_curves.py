"""Curves out of metrics.jsonl, whatever state it is in; the fixed questions out of eval.jsonl."""

from megatron_pz.report.jsonl import to_line
from megatron_pz.report.questions import read_questions
from megatron_pz.report.run_files import read_curves


def test_columns_have_a_value_or_none_for_each_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval/held_out/accuracy": 0.5}\n{"step": 1, "loss": 0.125, "no/such": 1}\n{"st')
    curves = read_curves(path)
    assert curves.steps == (0, 1)
    assert curves.columns == {"loss": [None, 0.125], "eval/held_out/accuracy": [0.5, None]}
    assert (curves.steps_per_point, curves.num_damaged) == (1, 1)


def test_of_a_step_done_twice_the_later_record_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(to_line({"step": s, "loss": v}) for s, v in ((1, 1.0), (2, 2.0), (2, 3.0), (3, 4.0))))
    assert read_curves(path).columns["loss"] == [1.0, 3.0, 4.0]


def test_what_is_no_number_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": NaN, "lr": "high", "grad_norm": true}\n{"step": 2, "loss": 1e999, "lr": 1}\n7\n'
    )
    curves = read_curves(path)
    assert curves.columns == {"loss": [None, None], "grad_norm": [None, None], "lr": [None, 1.0]}
    assert curves.num_damaged == 1


def test_a_long_run_becomes_means_of_stretches(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(to_line({"step": s, "loss": float(s)} | ({"lr": 1.0} if s == 4 else {})) for s in range(1, 8))
    )
    curves = read_curves(path, max_points=3)
    assert curves.steps_per_point == 3
    assert curves.steps == (3, 6, 7)
    assert curves.columns == {"loss": [2.0, 5.0, 7.0], "lr": [None, 1.0, None]}


def test_no_file_is_no_curve(tmp_path):
    assert read_curves(tmp_path / "metrics.jsonl").steps == ()


def test_a_question_gathers_its_answers_over_steps(tmp_path):
    path = tmp_path / "eval.jsonl"
    rows = [
        {
            "step": step,
            "set": name,
            "prompt": f"<pred>{text} [mask].",
            "target": "x",
            "answer": a,
            "reward": float(a == "x"),
        }
        for step, a in ((0, "y"), (10, "x"))
        for name, text in (("fixed_masks", "One"), ("fixed_masks", "Two"), ("held_out", "One"))
    ]
    path.write_text("".join(map(to_line, rows)) + '{"step": 1')
    questions = read_questions(path, max_questions=1)
    answers = [{"step": 0, "answer": "y", "right": False}, {"step": 10, "answer": "x", "right": True}]
    assert questions == [
        {"set": "fixed_masks", "text": "<pred>One [mask].", "target": "x", "answers": answers},
        {"set": "held_out", "text": "<pred>One [mask].", "target": "x", "answers": answers},
    ]  # one prompt alone shows no template
    assert [q["text"] for q in read_questions(path)] == ["One [mask].", "Two [mask].", "One [mask]."]
