"""Choosing what the page shows of a file of any size, and finding paragraphs in prompts."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.report.prompts import Frame, find_frame, hidden_spans
from megatron_pz.report.rounds import tree
from megatron_pz.report.sampling import MAX_TEXT, evenly, index, sample


def write(path, num_steps, paragraphs=2, rows=3, response="x", last=b""):
    with path.open("wb") as file:
        for step in range(1, num_steps + 1):
            for p in range(paragraphs):
                for _ in range(rows):
                    row = {"step": step, "role": "mask", "paragraph_id": f"p{p}", "response": response}
                    file.write(json.dumps(row).encode() + b"\n")
        file.write(last)
    return path


def test_a_small_file_is_shown_whole(tmp_path):
    shown = sample(write(tmp_path / "r.jsonl", 5), 10**6)
    assert (shown.num_shown, shown.num_rows, shown.num_steps, shown.num_left_out_paragraphs) == (30, 30, 5, 0)
    assert list(shown.rows) == [1, 2, 3, 4, 5]


def test_a_big_file_is_thinned_by_steps_and_says_so(tmp_path):
    path = write(tmp_path / "r.jsonl", 1000, response="y" * 100)
    shown = sample(path, path.stat().st_size // 10)
    assert (shown.num_rows, shown.num_steps, shown.num_left_out_paragraphs) == (6000, 1000, 0)
    assert len(shown.rows) in (99, 100)  # lines of later steps are a digit longer
    assert list(shown.rows)[0] == 1 and list(shown.rows)[-1] == 1000
    gaps = [b - a for a, b in zip(list(shown.rows), list(shown.rows)[1:], strict=False)]
    assert set(gaps) <= {10, 11}
    assert all(len(rows) == 6 for rows in shown.rows.values())


def test_of_big_steps_the_first_paragraphs_are_shown(tmp_path):
    path = write(tmp_path / "r.jsonl", 30, paragraphs=10, response="z" * 1000)
    shown = sample(path, path.stat().st_size // 10, min_steps=6)
    assert list(shown.rows) == [1, 7, 13, 18, 24, 30]
    # 6 steps in a tenth of 30 steps: half of each step's 10 paragraphs, of which a whole number fits.
    assert {len({row["paragraph_id"] for row in rows}) for rows in shown.rows.values()} <= {4, 5}
    assert shown.num_left_out_paragraphs in range(30, 37)
    tiny = sample(path, 10, min_steps=2)
    assert [len(rows) for rows in tiny.rows.values()] == [3, 3]  # one paragraph each, whatever its size


def test_the_file_is_not_held_in_memory(tmp_path):
    path = write(tmp_path / "r.jsonl", 400, response="w" * 5000)
    size = path.stat().st_size
    tracemalloc.start()
    shown = sample(path, 200_000, min_steps=4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 10_000_000
    assert peak < 2_000_000
    assert shown.num_rows == 2400


def test_damaged_lines_are_counted_and_a_cut_off_one_too(tmp_path):
    path = write(tmp_path / "r.jsonl", 2, last=b'{"step": 3, "role": "ma')
    path.write_bytes(path.read_bytes().replace(b'{"step": 1', b"garbage\n" + b'{"step": 1', 1))
    shown = sample(path, 10**6)
    assert (shown.num_rows, shown.num_damaged, list(shown.rows)) == (12, 2, [1, 2])


def test_a_line_that_is_damaged_behind_its_step_is_counted(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"step": 1, "role": "mask", "paragraph_id": "p"}\n{"step": 1, broken}\n')
    shown = sample(path, 10**6)
    assert (shown.num_shown, shown.num_damaged) == (1, 1)


def test_a_step_that_was_done_twice_has_two_places(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(f'{{"step": {s}, "n": {i}}}\n' for i, s in enumerate((1, 2, 3, 2, 2))))
    found = index(path)
    assert list(found.steps) == [1, 2, 3]
    assert len(found.steps[2].ranges) == 2 and found.steps[2].num_rows == 3
    assert [row["n"] for row in sample(path, 10**6).rows[2]] == [1, 3, 4]


def test_no_file_and_an_empty_file_are_no_rollouts(tmp_path):
    assert sample(tmp_path / "none.jsonl", 100).rows == {}
    (tmp_path / "r.jsonl").write_bytes(b"")
    assert sample(tmp_path / "r.jsonl", 100).num_rows == 0


def test_a_long_response_keeps_its_beginning_and_its_end(tmp_path):
    shown = sample(write(tmp_path / "r.jsonl", 1, 1, 1, response="a" * 9000 + "b" * 9000), 10**6)
    (row,) = shown.rows[1]
    assert row["response"].startswith("a" * 4000 + "\n… 12000 characters left out …\nb")
    assert row["response"].endswith("b" * 2000)
    assert len(row["response"]) < MAX_TEXT + 50


@given(st.integers(1, 300), st.integers(1, 50))
def test_evenly_chosen_steps_are_different_and_hold_the_last(n, k):
    items = list(range(n))
    chosen = evenly(items, k)
    assert len(chosen) == len(set(chosen)) == min(n, k)
    assert chosen == sorted(chosen) and chosen[-1] == n - 1
    assert k == 1 or chosen[0] == 0


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("<gen>", ""),
        ("Read this.\n\nPassage:\n", "\n\nThink about it.\n\nAssistant:"),
        ("<|user|>\n", "<|end|>\n<|assistant|>\n"),
    ],
)
def test_paragraphs_are_found_in_prompts(before, behind):
    texts = ["The sea is deep.", "The sky is high.", "The < sign is sharp."]
    frame = find_frame(before + text + behind for text in texts)
    assert [frame.open(before + text + behind) for text in texts] == texts


def test_a_single_prompt_is_shown_as_it_is():
    assert find_frame(["<gen>One.", "<gen>One."]) == Frame()
    assert Frame("<gen>", "</s>").open("something else") == "something else"
    assert Frame("aba", "bab").open("abab") == "abab"  # they would overlap


@pytest.mark.parametrize(
    ("masked", "spans"),
    [
        ("[mask] and [mask]", [(0, 2), (7, 9)]),
        ("東京 and [mask]", [(7, 9)]),  # one_mask hides one of two
        (None, [(0, 2), (7, 9)]),
        ("a prompt that is not about this text", [(0, 2), (7, 9)]),
    ],
)
def test_hidden_places_are_those_of_the_prediction_prompt(masked, spans):
    assert hidden_spans("東京 and 東京", "東京", masked) == spans


def test_rows_with_missing_fields_do_not_stop_the_page():
    rows = [
        {"role": "mask"},
        {"role": "prediction", "mask_id": "m"},
        {"role": "mask", "group_id": "g", "answer": 3},
        {},
    ]
    (step,) = tree({4: rows})
    assert step["step"] == 4
    assert sum(len(paragraph["masks"]) for paragraph in step["paragraphs"]) == 3


def test_predictions_hang_below_their_mask():
    common = {"paragraph_id": "p", "valid": True, "trained": True, "num_tokens": 3}
    masks = [
        {"group_id": "1.0", "mask_id": "1.0.0", "prompt": "<gen>a cat", "answer": "cat", "reward": 0.5},
        {"group_id": "1.1", "mask_id": "1.1.0", "prompt": "<gen>a dog", "answer": "cow", "valid": False},
    ]
    asked = {"mask_id": "1.0.0", "prompt": "<pred>a [mask]", "target": "cat"}
    predictions = [asked | {"answer": "cat", "reward": 1.0}, asked | {"answer": "dog", "reward": 0.0}]
    rows = [common | {"role": "mask"} | row for row in masks]
    rows += [common | {"role": "prediction"} | row for row in predictions]
    (step,) = tree({1: rows})
    cat, dog = step["paragraphs"]  # the same paragraph id twice in a step: two rounds of play
    assert (cat["text"], dog["text"]) == ("a cat", "a dog")
    (mask,) = cat["masks"]
    assert mask["spans"] == [(2, 5)]
    assert [(p["answer"], p["reward"]) for p in mask["predictions"]] == [("cat", 1.0), ("dog", 0.0)]
    assert dog["masks"][0]["spans"] == [] and dog["masks"][0]["predictions"] == []
