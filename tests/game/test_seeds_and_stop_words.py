"""Seeds by name, and the function words."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.game.seeds import derive
from megatron_pz.game.stop_words import STOP_WORDS, is_stop_words

PARTS = st.lists(st.one_of(st.integers(), st.text(max_size=8)), min_size=1, max_size=4)


@given(PARTS, PARTS)
def test_other_names_have_other_seeds_and_the_same_name_the_same(first, second):
    assert (derive(*first) == derive(*second)) == (first == second)
    assert 0 <= derive(*first) < 2**63


def test_a_seed_never_changes_between_versions():
    assert derive(1234, 1, 0, "leads:1", "mask", 0) == 5713637017285719787


def test_function_words_alone_are_stop_words():
    assert is_stop_words("the") and is_stop_words("of the") and is_stop_words("Which,")
    assert not any(is_stop_words(text) for text in ("", "...", "Paris", "the Seine", "1990"))
    assert all(word == word.casefold() and word.isalpha() for word in STOP_WORDS)
