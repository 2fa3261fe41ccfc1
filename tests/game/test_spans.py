r"""Reading a mask rollout: the three validity modes, and each reason for which a span cannot be hidden."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.config.schema import TaskConfig
from megatron_pz.game.braces import last_braced
from megatron_pz.game.masking import MaskRules, restore
from megatron_pz.game.spans import MASK_REJECT_REASONS, read_span, reject_reason
from megatron_pz.types import Paragraph

PARAGRAPH = Paragraph("p", "Paris is the capital of France. The Seine flows through Paris and its parks.")
DEFAULT = MaskRules()


def _read(response, rules=DEFAULT, paragraph=PARAGRAPH, finish="stop", seed=0):
    return read_span(response, paragraph, finish, rules, random.Random(seed))


def test_a_named_span_is_hidden_wherever_it_stands():
    reading = _read(r"I choose the city. \mask{ Paris }")
    assert (reading.answer, reading.reason) == ("Paris", None)
    assert reading.mask.masked_text == "[mask] is the capital of France. The Seine flows through [mask] and its parks."
    assert reading.mask.spans == ((0, 5), (56, 61))
    assert (reading.mask.paragraph_id, reading.mask.answer, reading.mask.num_occurrences) == ("p", "Paris", 2)


REJECTED = {
    "truncated": (r"\mask{Paris}", {"finish": "length"}),
    "aborted": (r"\mask{Paris}", {"finish": "abort"}),
    "no_mask": (r"Paris \mask{Paris", {}),
    "empty": ("\\mask{ \n}", {}),
    "forbidden_text": (r"\mask{\text{Paris}}", {}),
    "not_in_paragraph": (r"\mask{paris}", {}),
    "too_many_occurrences": (r"\mask{Paris}", {"rules": MaskRules(max_occurrences=1)}),
    "whole_paragraph": (f"\\mask{{{PARAGRAPH.text}}}", {"rules": MaskRules(max_fraction=1.0)}),
    "too_long": (r"\mask{the capital of France. The Seine flows through}", {}),
    "partial_word": (r"\mask{par}", {"rules": MaskRules("whole_words")}),
}


@pytest.mark.parametrize("reason", REJECTED)
def test_a_span_that_cannot_be_hidden_says_why(reason):
    response, options = REJECTED[reason]
    reading = _read(response, **options)
    assert (reading.mask, reading.reason) == (None, reason)


def test_every_reason_of_a_mask_is_known_and_tested():
    assert set(MASK_REJECT_REASONS) == {*REJECTED, "prompt_too_long"}  # the last in tests/tasks: it needs a prompt


@pytest.mark.parametrize("answer", ["a [mask] b", "a \\b", "a } b { c"])
def test_text_of_the_game_cannot_be_hidden(answer):
    assert reject_reason(answer, f"so {answer} it is, and much more text besides", DEFAULT) == "forbidden_text"


def test_seven_occurrences_are_allowed_and_eight_are_not():
    assert reject_reason("cat", "cat " * 7 + "x" * 9, DEFAULT) is None
    assert reject_reason("cat", "cat " * 8 + "x" * 9, DEFAULT) == "too_many_occurrences"


def test_half_of_the_characters_are_allowed_and_one_more_is_not():
    assert reject_reason("abcde", "abcdefghij", DEFAULT) is None
    assert reject_reason("abcdef", "abcdefghij", DEFAULT) == "too_long"


def test_the_default_may_hide_a_part_of_a_word():
    assert _read(r"\mask{apita}").mask.masked_text.startswith("Paris is the c[mask]l of")


def test_whole_words_wants_every_occurrence_whole():
    rules = MaskRules("whole_words")
    assert _read(r"\mask{Paris}", rules).reason is None
    text = "The cat sat. Then it sat concatenated."  # "cat" is a word once and a part of one once
    assert _read(r"\mask{cat}", rules, Paragraph("p", text)).reason == "partial_word"


def test_one_mask_hides_one_place_and_the_draw_is_seeded():
    rules = MaskRules("one_mask")
    masks = [_read(r"\mask{Paris}", rules, seed=seed).mask for seed in range(20)]
    assert {mask.spans for mask in masks} == {((0, 5),), ((56, 61),)}
    assert all(mask.num_occurrences == 2 and mask.masked_text.count("[mask]") == 1 for mask in masks)
    assert masks == [_read(r"\mask{Paris}", rules, seed=seed).mask for seed in range(20)]


def test_the_rules_are_those_of_the_settings():
    config = TaskConfig(mask_validity="one_mask", max_occurrences=3, max_mask_fraction=0.25)
    assert MaskRules.of(config) == MaskRules("one_mask", 3, 0.25)
    assert MaskRules.of(TaskConfig()) == MaskRules("default", 7, 0.5)


@given(
    st.text(alphabet="ab {}\\é東[mask]", max_size=30),
    st.text(alphabet="ab {}\\é東[mask]", max_size=10),
    st.sampled_from(["default", "one_mask", "whole_words"]),
    st.sampled_from(["stop", "length", "abort"]),
)
def test_a_reading_is_a_mask_or_a_known_reason_and_never_both(text, named, validity, finish):
    reading = _read(f"\\mask{{{named}}}", MaskRules(validity), Paragraph("p", text), finish)
    assert (reading.mask is None) == (reading.reason in MASK_REJECT_REASONS)
    if reading.mask is not None:
        assert (
            reading.reason is None
            and reading.mask.answer == reading.answer == last_braced(f"\\mask{{{named}}}", "mask").strip()
        )
        if "[mask]" not in text:
            assert restore(reading.mask) == text
