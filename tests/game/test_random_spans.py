"""Spans that chance chooses: the law, the places, the validity, the seeds."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.game.masking import MaskRules, cuts_no_word, restore
from megatron_pz.game.random_spans import MANY, fixed_masks, random_mask, span_length
from megatron_pz.game.spans import reject_reason
from megatron_pz.types import Paragraph
from megatron_pz.words import words

TEXT = "Paris is the capital of France. The Seine, 777 km long, flows through it and on to the sea near Le Havre."
LAW = {"span_p": 0.2, "max_words": 10}


def _draw(seed, text=TEXT, rules=None, **options):
    return random_mask(Paragraph("p", text), rules or MaskRules(), random.Random(seed), **(LAW | options))


def test_words_keep_their_inner_punctuation_and_no_other():
    text = "“It's a well-known, 3.14 km² café—東京.”"
    assert [text[a:b] for a, b in words(text)] == ["It's", "a", "well-known", "3.14", "km²", "café", "東", "京"]


def test_lengths_follow_the_clipped_geometric_law():
    rng = random.Random(0)
    drawn = [span_length(rng, 0.2, 10) for _ in range(20_000)]
    for length in range(1, 10):
        assert drawn.count(length) / len(drawn) == pytest.approx(0.2 * 0.8 ** (length - 1), abs=0.01)  # sd below 0.003
    assert drawn.count(10) / len(drawn) == pytest.approx(0.8**9, abs=0.01)
    assert sum(drawn) / len(drawn) == pytest.approx((1 - 0.8**10) / 0.2, abs=0.06)  # 4.46


def test_one_word_spans_come_with_a_limit_of_one():
    assert {len(_draw(seed, max_words=1).answer.split()) for seed in range(50)} == {1}


@given(st.integers(0, 10_000), st.sampled_from(["default", "one_mask", "whole_words"]))
def test_a_random_mask_is_valid_and_of_whole_words(seed, validity):
    rules = MaskRules(validity)
    mask = _draw(seed, rules=rules)
    assert reject_reason(mask.answer, TEXT, rules) is None
    assert restore(mask) == TEXT
    start = TEXT.index(mask.answer)
    assert any(
        cuts_no_word(TEXT, (i, i + len(mask.answer)))
        for i in range(start, len(TEXT))
        if TEXT.startswith(mask.answer, i)
    )


def test_every_word_is_drawn_and_its_place_is_uniform():
    text = "one two three four five six seven eight"
    drawn = [_draw(seed, text, max_words=1).answer for seed in range(1600)]
    assert {word: 150 < drawn.count(word) < 250 for word in text.split()} == dict.fromkeys(
        text.split(), True
    )  # 200, sd 13


@pytest.mark.parametrize("text", ["", "... --- !", "word", "a" * 40, "x " * 9 + "x"])
def test_a_text_without_a_valid_span_gives_none(text):
    assert _draw(0, text, max_words=1) is None


def test_a_further_condition_is_kept():
    assert all(len(_draw(seed, fits=lambda m: len(m.answer) < 6).answer) < 6 for seed in range(50))
    assert _draw(0, fits=lambda m: False) is None


PARAGRAPHS = [Paragraph(f"p{i}", f"Number {i} stands here with {i * 7} other words of the text.") for i in range(12)]


def test_fixed_masks_are_the_same_in_every_run_and_others_under_another_seed():
    first = fixed_masks(PARAGRAPHS, 6, 7, MaskRules(), **LAW)
    assert first == fixed_masks(PARAGRAPHS, 6, 7, MaskRules(), **LAW)
    assert first != fixed_masks(PARAGRAPHS, 6, 8, MaskRules(), **LAW)
    assert len({mask.paragraph_id for mask in first}) == 6


def test_more_fixed_masks_begin_with_the_fewer():
    assert fixed_masks(PARAGRAPHS, 9, 7, MaskRules(), **LAW)[:4] == fixed_masks(PARAGRAPHS, 4, 7, MaskRules(), **LAW)


class Endless(Sequence):
    """A million paragraphs that count how often they are read."""

    num_read = 0

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        self.num_read += 1
        return Paragraph(f"p{index}", f"Number {index} stands here with {index * 7} other words of the text.")


def test_of_a_long_corpus_only_a_part_is_read_and_questions_are_from_all_of_it():
    corpus = Endless()
    masks = fixed_masks(corpus, 200, 7, MaskRules(), **LAW)
    assert corpus.num_read < 3 * MANY
    assert masks[:50] == fixed_masks(Endless(), 50, 7, MaskRules(), **LAW)
    assert masks != fixed_masks(Endless(), 200, 8, MaskRules(), **LAW)
    tenths = [int(mask.paragraph_id[1:]) // 100_000 for mask in masks]
    assert {tenths.count(tenth) > 6 for tenth in range(10)} == {True}  # 20, sd 4.2
    assert len({mask.paragraph_id for mask in masks}) == 200


def test_few_paragraphs_are_asked_about_several_times_and_hopeless_ones_never():
    masks = fixed_masks([*PARAGRAPHS[:3], Paragraph("hopeless", "...")], 10, 7, MaskRules(), **LAW)
    assert [sum(mask.paragraph_id == p.id for mask in masks) for p in PARAGRAPHS[:3]] in (
        [4, 3, 3],
        [3, 4, 3],
        [3, 3, 4],
    )
    assert fixed_masks([Paragraph("hopeless", "...")], 3, 7, MaskRules(), **LAW) == []
    assert fixed_masks([], 3, 7, MaskRules(), **LAW) == []
