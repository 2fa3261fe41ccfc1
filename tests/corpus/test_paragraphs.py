"""Which paragraphs are played, by the bytes of their text (one token each in these tests)."""

import pytest
from builders import ByteTokenizer

from megatron_pz.corpus.paragraphs import RESERVED, select
from megatron_pz.errors import CorpusError
from megatron_pz.types import Paragraph


def _paragraphs(*texts):
    return [Paragraph(str(i), text) for i, text in enumerate(texts)]


def test_both_limits_are_within_and_the_rest_is_counted():
    kept, counts = select(_paragraphs("abc", "abcd", "abcdef", "abcdefg", ""), ByteTokenizer(), 4, 6)
    assert [p.text for p in kept] == ["abcd", "abcdef"]
    assert counts == {"kept": 2, "too_short": 2, "too_long": 1}


@pytest.mark.parametrize("word", RESERVED)
def test_text_with_a_word_of_the_game_is_left_out(word):
    kept, counts = select(_paragraphs("a fine text", f"an {word}{{x}} inside"), ByteTokenizer(), 1, 99)
    assert [p.text for p in kept] == ["a fine text"]
    assert counts == {"kept": 1, "reserved_text": 1}


def test_text_that_spells_an_end_token_is_left_out():
    class SpellsEnd(ByteTokenizer):
        def encode(self, text):
            head, *rest = text.split("<eos>")
            return [
                *super().encode(head),
                *(i for part in rest for i in (self.EOS, *super(SpellsEnd, self).encode(part))),
            ]

    _, counts = select(_paragraphs("fine", "an <eos> inside"), SpellsEnd(), 1, 99)
    assert counts == {"kept": 1, "special_token": 1}


def test_a_prompt_over_the_limit_is_left_out():
    def prompt_ids(text):
        return ByteTokenizer().encode("12345" + text)

    kept, counts = select(
        _paragraphs("abc", "abcd"), ByteTokenizer(), 1, 99, prompt_ids=prompt_ids, max_prompt_tokens=8
    )
    assert [p.text for p in kept] == ["abc"]
    assert counts == {"kept": 1, "prompt_too_long": 1}


def test_nothing_left_is_told_with_the_numbers():
    with pytest.raises(
        CorpusError, match=r"None of 3 .*too_short 1, too_long 2.*5 to 6 tokens.*--max-paragraph-tokens"
    ):
        select(_paragraphs("a", "abcdefg", "abcdefgh"), ByteTokenizer(), 5, 6)
    with pytest.raises(CorpusError, match="the corpus is empty"):
        select([], ByteTokenizer(), 5, 6)
