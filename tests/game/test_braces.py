r"""Reading `\mask{...}` out of text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.game.braces import is_balanced, last_braced

CASES = {
    "nothing": ("no command", None),
    "plain": (r"so \mask{Paris}.", "Paris"),
    "the last of several": (r"\mask{a} then \mask{b}", "b"),
    "the last closed one": (r"\mask{a} then \mask{b", "a"),
    "only an open one": (r"\mask{a", None),
    "braces inside": (r"\mask{f{x}{y{z}}}", "f{x}{y{z}}"),
    "an open brace inside": (r"\mask{a { b}", None),
    "a closing brace too many": (r"} \mask{a}} }", "a"),
    "inside another": (r"\mask{a \mask{b} c}", "b"),
    "inside one that stays open": (r"\mask{a \mask{b} c", "b"),
    "inside other braces": (r"{{\mask{a}", "a"),
    "empty": (r"\mask{}", ""),
    "space kept": ("\\mask{ a\n}", " a\n"),
    "another command": (r"\boxed{a} \masked{b} mask{c}", None),
    "Unicode": ("\\mask{東京 e\u0301 \U0001f5fc}", "東京 e\u0301 \U0001f5fc"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_last_balanced_command_is_read(case):
    text, wanted = CASES[case]
    assert last_braced(text, "mask") == wanted


def _by_definition(text, command):
    """Try each opening from the last on; count the depth up to the brace that closes it."""
    opening = f"\\{command}{{"
    for start in range(len(text), -1, -1):
        if text.startswith(opening, start):
            depth = 1
            for end in range(start + len(opening), len(text)):
                depth += (text[end] == "{") - (text[end] == "}")
                if depth == 0:
                    return text[start + len(opening) : end]
    return None


@given(st.lists(st.sampled_from(["\\mask{", "\\boxed{", "{", "}", "a", " ", "\\", "mask"]), max_size=24))
def test_one_pass_finds_what_the_definition_says(pieces):
    text = "".join(pieces)
    assert last_braced(text, "mask") == _by_definition(text, "mask")


@given(st.text(), st.text(), st.text())
def test_a_balanced_answer_at_the_end_is_always_read(before, answer, after):
    if is_balanced(answer) and "\\mask{" not in answer + after:
        assert last_braced(f"{before}\\mask{{{answer}}}{after.replace('}', '')}", "mask") == answer


@given(st.text(alphabet="{}a", max_size=12))
def test_balance_is_what_deleting_pairs_leaves_nothing_of(text):
    rest = text.replace("a", "")
    while "{}" in rest:
        rest = rest.replace("{}", "")
    assert is_balanced(text) == (rest == "")


def test_a_hostile_response_is_read_in_one_pass():
    # 40,000 openings, none closed: quadratic work would take minutes, and the test's own time limit ends it.
    assert last_braced("\\mask{" * 40_000 + "x", "mask") is None
