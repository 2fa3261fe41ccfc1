"""Hiding and putting back."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.game.masking import MASK_TOKEN, cuts_no_word, hide, make_mask, occurrences, restore, shuffle_context
from megatron_pz.types import Paragraph

TEXT = st.text(alphabet="ab ñ東\U0001f5fc", min_size=1, max_size=30)


def test_occurrences_are_counted_from_the_left_without_overlap():
    assert occurrences("aaaa a", "aa") == [(0, 2), (2, 4)]
    assert occurrences("Paris, paris, Paris", "Paris") == [(0, 5), (14, 19)]
    assert occurrences("Paris", "Rome") == []


@given(TEXT, TEXT)
def test_there_are_as_many_occurrences_as_str_count_says(text, answer):
    found = occurrences(text, answer)
    assert len(found) == text.count(answer)
    assert all(text[start:end] == answer for start, end in found)
    assert all(first[1] <= second[0] for first, second in zip(found, found[1:], strict=False))


@given(TEXT, st.data())
def test_hiding_then_putting_back_gives_the_text(text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    answer = text[start : data.draw(st.integers(start + 1, len(text)))]
    found = occurrences(text, answer)
    for validity in ("default", "one_mask"):
        mask = make_mask(Paragraph("p", text), answer, found, validity, random.Random(0))
        assert restore(mask) == text
        assert mask.masked_text == hide(text, mask.spans)
        assert mask.masked_text.count(MASK_TOKEN) == len(mask.spans) == (len(found) if validity == "default" else 1)
        assert mask.num_occurrences == len(found)


@given(TEXT, st.data())
def test_hiding_every_place_is_plain_replacement(text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    answer = text[start : data.draw(st.integers(start + 1, len(text)))]
    assert hide(text, occurrences(text, answer)) == text.replace(answer, MASK_TOKEN)


def test_one_mask_draws_each_place_about_equally_often():
    paragraph, found = Paragraph("p", "the cat saw the cat by the cat"), [(4, 7), (16, 19), (27, 30)]
    drawn = [make_mask(paragraph, "cat", found, "one_mask", random.Random(s)).spans[0] for s in range(300)]
    assert {span: 70 < drawn.count(span) < 130 for span in found} == dict.fromkeys(found, True)  # 100 each, sd 8


@pytest.mark.parametrize(
    ("text", "answer", "whole"),
    [
        ("the cat sat", "cat", True),
        ("the cats sat", "cat", False),
        ("concat", "cat", False),
        ("cat", "cat", True),
        ("(cat)", "cat", True),
        ("the cat sat", "cat ", True),
        ("a well-known cat", "known", True),
        ("snake_case", "snake", False),
        ("1984", "19", False),
        ("Zürich", "Z", False),
    ],
)
def test_a_cut_between_two_word_characters_cuts_a_word(text, answer, whole):
    assert cuts_no_word(text, occurrences(text, answer)[0]) is whole


def test_words_of_a_text_without_spaces_are_its_characters():
    made = make_mask(
        Paragraph("p", "東京は日本の首都です。東京"), "東京", [(0, 2), (11, 13)], "default", random.Random(0)
    )
    mixed = shuffle_context(made, random.Random(3)).masked_text
    assert mixed != made.masked_text and mixed.count(MASK_TOKEN) == 2 and " " not in mixed
    assert sorted(mixed.replace(MASK_TOKEN, "")) == sorted("は日本の首都です。")


def test_a_character_keeps_its_marks_in_the_shuffle():
    text = "cafe\u0301xyz"
    made = make_mask(Paragraph("p", text), "x", [(5, 6)], "default", random.Random(0))
    for seed in range(9):
        assert "e\u0301" in shuffle_context(made, random.Random(seed)).masked_text
