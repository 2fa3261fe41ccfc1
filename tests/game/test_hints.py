"""Masks that luck can guess, and answers that the text still says."""

import pytest

from megatron_pz.game.hints import is_lottery, is_still_visible


@pytest.mark.parametrize("answer", ["7", "1905", "x", ".", "of the", "東", "1,000", "의해", "the 7"[4:]])
def test_luck_can_guess_it(answer):
    assert is_lottery(answer)


@pytest.mark.parametrize("answer", ["Paris", "3 May", "of Paris", "東京", "tree resin", "B12"])
def test_luck_alone_cannot_guess_it(answer):
    assert not is_lottery(answer)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Amber", "[mask] is a resin. Raw amber is cut."),  # another case
        ("AMBER", "[mask]: amber-coloured"),
        ("elevation", "[mask]; maps elevate it further"),  # inflected
        ("resin", "[mask] and Resins"),
        ("Paris", "[mask], and the Parisian"),
        ("tree resin", "[mask] of trees; resins harden"),  # each word, anywhere
        ("The Amber", "[mask] is amber"),  # function words do not count
        ("서울", "[mask]에 서울은 크다"),  # a particle
        ("U.S.", "[mask] and u.s."),
        ("Straße", "[mask] STRASSE"),
        ("cat", "[mask] and cat"),  # where one of several places is hidden
    ],
)
def test_the_text_still_says_it(answer, text):
    assert is_still_visible(answer, text)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Paris", "[mask] is the capital of France"),
        ("cat", "[mask] and category, cats, CATASTROPHE"),  # too short for a stem
        ("tree resin", "[mask] of trees"),  # half of it
        ("of the", "[mask] of The"),  # function words alone
        ("1905", "[mask] 19050"),
        ("mask", "[mask] is hidden"),  # the sign itself says nothing
        ("running", "[mask] races"),
        ("native", "[mask] nation"),
        ("ar", "[mask] car"),
    ],
)
def test_the_text_does_not_say_it(answer, text):
    assert not is_still_visible(answer, text)
