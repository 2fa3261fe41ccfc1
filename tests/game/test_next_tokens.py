"""Next-token questions: which token, what is shown before it, what counts as it."""

import random

import pytest
from builders import ByteTokenizer

from megatron_pz.game.next_tokens import hardest, hide_token, next_token_mask
from megatron_pz.types import Paragraph

TEXT = Paragraph("p", "The café \\ is {big}.")


def test_the_hardest_are_the_upper_share_in_the_order_of_the_text_and_never_the_first():
    entropies = [9.0, 1.0, 5.0, 2.0, 4.0, 3.0, 0.0, 0.5, 0.2, 0.1]
    assert hardest(entropies, 0.2) == [2, 4]  # 20% of the 9 that count are 1.8: two
    assert hardest(entropies, 1.0) == list(range(1, 10))
    assert hardest([3.0, 1.0], 0.2) == [1]
    assert hardest([3.0], 0.2) == [] and hardest([], 0.2) == []


def test_the_text_is_cut_behind_the_token_and_the_white_space_before_it_stays():
    mask = hide_token(TEXT, "The", "The café")
    assert (mask.answer, mask.masked_text, mask.spans, mask.num_occurrences) == ("café", "The [mask]", ((4, 8),), 1)
    assert TEXT.text[slice(*mask.spans[0])] == mask.answer


@pytest.mark.parametrize(
    ("before", "through"),
    [
        ("The", "The "),  # white space
        ("The caf", "The caf\ufffd"),  # half of a character
        ("The café ", "The café \\"),  # cannot be boxed
        ("The café \\ is ", "The café \\ is {big"),  # nor can this: no partner
        ("", "The"),  # nothing before it
        ("Ten", "Ten men"),  # not of this text
    ],
)
def test_a_token_that_cannot_be_asked_for_is_none(before, through):
    assert hide_token(TEXT, before, through) is None


def test_every_possible_token_is_asked_for_and_no_other():
    text = Paragraph("p", "né of")
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text.text)  # n, two halves of é, space, o, f

    def drawn(places):
        for seed in range(40):
            yield next_token_mask(text, ids, places, tokenizer.decode, random.Random(seed), fits=lambda mask: True)

    # The second half of é would come after half a character, the space is nothing.
    assert {mask.masked_text for mask in drawn(range(1, len(ids)))} == {"né [mask]", "né o[mask]"}
    assert set(drawn([1, 3])) == {None}


def test_a_question_that_does_not_fit_is_not_asked():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("abcdef")
    places = range(1, 6)
    text = Paragraph("p", "abcdef")
    for seed in range(20):
        mask = next_token_mask(
            text, ids, places, tokenizer.decode, random.Random(seed), fits=lambda mask: len(mask.masked_text) < 8
        )
        assert mask.masked_text == "a[mask]"
