"""Korean, Chinese and texts with combining marks through hiding, matching and chance. Texts written for this test."""

import random

import pytest

from megatron_pz.game.answers import matches, read_answer
from megatron_pz.game.masking import MaskRules, cuts_no_word, occurrences, restore
from megatron_pz.game.random_spans import random_mask
from megatron_pz.game.spans import read_span, reject_reason
from megatron_pz.game.stop_words import is_stop_words
from megatron_pz.types import Paragraph
from megatron_pz.words import words

KOREAN = Paragraph("ko", "호박은 나무의 진이 굳어서 생긴 보석이다. 옛사람들은 호박을 부적으로 지니고 다녔다.")
CHINESE = Paragraph("zh", "琥珀是古代樹脂形成的化石，常被做成飾品。1999年，當地博物館展出了三百件琥珀。")


def read(text, paragraph, rules=None):
    return read_span(f"\\mask{{{text}}}", paragraph, "stop", rules or MaskRules(), random.Random(0))


def test_a_chinese_span_is_hidden_by_its_characters():
    mask = read("琥珀", CHINESE, MaskRules("whole_words")).mask
    assert mask.masked_text == "[mask]是古代樹脂形成的化石，常被做成飾品。1999年，當地博物館展出了三百件[mask]。"
    assert mask.spans == ((0, 2), (37, 39)) and restore(mask) == CHINESE.text
    assert matches(read_answer("答案是 \\boxed{琥珀}", "stop").answer, mask.answer)


def test_a_korean_word_is_what_stands_between_spaces():
    assert read("호박", KOREAN).mask.spans == ((0, 2), (30, 32))
    assert read("호박", KOREAN, MaskRules("whole_words")).reason == "partial_word"  # its particle is cut off
    assert read("호박은", KOREAN, MaskRules("whole_words")).mask.masked_text.startswith("[mask] 나무의")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1999年，東京。", ["1999", "年", "東", "京"]),
        ("東京タワーです", ["東", "京", "タワー", "で", "す"]),
        ("서울은 크다", ["서울은", "크다"]),
        ("cafe\u0301 au lait", ["cafe\u0301", "au", "lait"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("\u1112\u1161\u11ab\u1100\u116e\u11a8 x", ["\u1112\u1161\u11ab\u1100\u116e\u11a8", "x"]),
    ],
)
def test_words_of_each_script(text, found):
    assert [text[a:b] for a, b in words(text)] == found


def test_a_place_that_parts_a_character_from_its_marks_is_none():
    assert occurrences("a cafe\u0301, a cafe", "cafe") == [(11, 15)]
    assert occurrences("\u1112\u1161\u11ab", "\u1112") == []  # the first third of a syllable
    assert reject_reason("cafe", "we sat in the cafe\u0301 all day", MaskRules()) == "not_in_paragraph"
    assert cuts_no_word("a cafe\u0301 b", (2, 7)) and not cuts_no_word("a cafe\u0301 b", (2, 6))


@pytest.mark.parametrize("paragraph", [KOREAN, CHINESE])
def test_chance_hides_whole_words_of_few_characters(paragraph):
    rules = MaskRules("whole_words")
    masks = [random_mask(paragraph, rules, random.Random(i), span_p=0.5, max_words=3) for i in range(40)]
    assert all(mask is not None and restore(mask) == paragraph.text for mask in masks)
    assert len({mask.answer for mask in masks}) > 10
    if paragraph is CHINESE:
        assert max(len(words(mask.answer)) for mask in masks) == 3


@pytest.mark.parametrize(
    ("text", "only"), [("的是", True), ("因为", True), ("的山", False), ("그리고", True), ("호박을", False)]
)
def test_function_words(text, only):
    assert is_stop_words(text) is only
