"""Reading a prediction and comparing it (docs/paper.md 3.3)."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.game.answers import is_near_miss, matches, normalise, read_answer

SAME = {
    "equal": ("elevation", "elevation"),
    "space at the ends": (" elevation\n", "elevation"),
    "space between": ("New \n  York", "New York"),
    "one text": (r"\text{New York}", "New York"),
    "one mathrm": (r"\mathrm{H2O}", "H2O"),
    "space in the wrapping": (r" \text{ Rome } ", "Rome"),
    "escapes": (r"AT\&T 5\% \#1 \$3 a\_b", "AT&T 5% #1 $3 a_b"),
    "composed": ("caf\u00e9", "cafe\u0301"),
    "decomposed": ("cafe\u0301", "caf\u00e9"),
    "full-width digits": ("１９９９年", "1999年"),
    "half-width katakana": ("ﾀﾜｰ", "タワー"),
    "decomposed Hangul": ("\u1112\u1161\u11ab\u1100\u116e\u11a8", "한국"),
    "an ideographic space": ("서울\u3000역", "서울 역"),
}
DIFFERENT = {
    "a stem": ("elevate", "elevation"),
    "case": ("paris", "Paris"),
    "a full stop": ("Paris.", "Paris"),
    "a hyphen": ("well known", "well-known"),
    "an article": ("the Seine", "Seine"),
    "wrapped twice": (r"\text{\text{Rome}}", "Rome"),
    "two texts": (r"\text{New} \text{York}", "New York"),
    "nothing": (None, "Paris"),
    "empty": ("", "Paris"),
}


@pytest.mark.parametrize("case", SAME)
def test_accidents_of_form_are_forgiven(case):
    assert matches(*SAME[case])


@pytest.mark.parametrize("case", DIFFERENT)
def test_differences_of_content_are_not(case):
    assert not matches(*DIFFERENT[case])


def test_casefold_forgives_case_and_nothing_else():
    assert matches("STRASSE", "Straße", "casefold") and matches("paris", "Paris", "casefold")
    assert not matches("paris.", "Paris", "casefold")


@pytest.mark.parametrize(
    ("response", "finish", "answer", "reason"),
    [
        (r"It was \boxed{ Paris }, surely.", "stop", "Paris", None),
        (r"\boxed{Rome} no, \boxed{Paris}", "stop", "Paris", None),
        (r"\boxed{\text{Paris}}", "stop", r"\text{Paris}", None),
        (r"\boxed{}", "stop", "", None),
        ("Paris", "stop", None, "no_box"),
        (r"\mask{Paris}", "stop", None, "no_box"),
        (r"\boxed{Paris", "length", None, "truncated"),
        (r"\boxed{Paris} and", "length", "Paris", "truncated"),
        (r"\boxed{Paris}", "abort", "Paris", "aborted"),
    ],
)
def test_the_last_box_of_a_finished_response_is_the_answer(response, finish, answer, reason):
    reading = read_answer(response, finish)
    assert (reading.answer, reading.reason) == (answer, reason)


@pytest.mark.parametrize(
    ("answer", "target", "near"),
    [
        ("paris", "Paris", True),
        ("Paris.", "Paris", True),
        ("well known", "well-known", True),
        ("US", "U.S.", True),
        ("Paris", "Paris", False),  # right, not near
        ("Rome", "Paris", False),
        ("", "Paris", False),
        (None, "Paris", False),
        ("...", "!!", False),  # nothing is left of either
    ],
)
def test_a_near_miss_is_wrong_by_case_punctuation_or_space_alone(answer, target, near):
    assert is_near_miss(answer, target) is near


def test_what_casefold_forgives_is_no_near_miss_under_it():
    assert is_near_miss("paris", "Paris", "strict") and not is_near_miss("paris", "Paris", "casefold")


@given(st.text())
def test_normalising_again_changes_nothing_but_deeper_wrappings(text):
    once = normalise(text)
    if "\\" not in once:
        assert normalise(once) == once
    assert once == unicodedata.normalize("NFKC", once)


@given(st.text(min_size=1))
def test_a_text_matches_itself_in_a_box(text):
    if "\\" not in text and "{" not in text and "}" not in text:
        assert matches(read_answer(f"\\boxed{{ {text}}}", "stop").answer, text)
