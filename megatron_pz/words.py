"""Words of any language, by the characters' kinds alone: no dictionary, and no need of white space.

1. Scripts without spaces (Han, kana, Thai, Lao, Khmer, Burmese): each character with its marks is a word of its own, as
   Unicode's word boundaries (UAX 29) have it for Han and hiragana; a run of katakana is one word.
2. All other scripts: a run of letters, digits and marks; inner hyphens, apostrophes, stops and commas belong to it.
   In Korean this is the unit between spaces, its particle included.
3. No cut falls between a character and the marks on it, decomposed Hangul syllables included.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

UNSPACED = frozenset({"CJK", "HIRAGANA", "THAI", "LAO", "KHMER", "MYANMAR"})
"""Scripts, as `script` names them, whose characters are each a word."""

_KATAKANA = frozenset({"KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH"})
_WORD = re.compile(r"cm*|km*(?:km*)*|wm*(?:[wm]|pw)*")


def words(text: str) -> list[tuple[int, int]]:
    """(start, end) of each word.

    >>> [text[a:b] for text in ["It's 1,000 (well-known) km."] for a, b in words(text)]
    ["It's", '1,000', 'well-known', 'km']
    >>> [text[a:b] for text in ["1999年の東京タワー"] for a, b in words(text)]
    ['1999', '年', 'の', '東', '京', 'タワー']
    """
    return [match.span() for match in _WORD.finditer("".join(map(_kind, text)))]


def is_word(character: str) -> bool:
    """True for letters, digits, marks on letters and the underscore."""
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def cuts_word(text: str, cut: int) -> bool:
    """True where a word goes on over `cut`, a place between two characters of `text`.

    >>> cuts_word("cats", 3), cuts_word("東京", 1), cuts_word("cafe" + chr(0x301), 4)
    (True, False, True)
    """
    if not 0 < cut < len(text):
        return False
    if continues(text[cut]):
        return is_word(text[cut - 1])
    before, after = _kind(_base(text, cut)), _kind(text[cut])
    return before == after and before in "wk"


def cuts_character(text: str, cut: int) -> bool:
    """True where `cut` parts a character from its marks."""
    return 0 < cut < len(text) and continues(text[cut]) and not text[cut - 1].isspace()


@lru_cache(maxsize=1 << 16)
def continues(character: str) -> bool:
    """True for what is part of the character before it: marks, joiners, vowels and finals of decomposed Hangul."""
    code = ord(character)
    is_jamo = 0x1160 <= code <= 0x11FF or 0xD7B0 <= code <= 0xD7FB
    return is_jamo or code in (0x200C, 0x200D) or unicodedata.category(character).startswith("M")


@lru_cache(maxsize=1 << 16)
def script(character: str) -> str:
    """The script of a letter, in the words of its Unicode name: LATIN, HANGUL, CJK, ...; empty for other characters.

    >>> script("é"), script("한"), script("東"), script("7")
    ('LATIN', 'HANGUL', 'CJK', '')
    """
    if not character.isalpha():
        return ""
    return unicodedata.name(unicodedata.normalize("NFKC", character)[0], "?").split()[0]


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    if character in "-'’.,":
        return "p"
    if continues(character):
        return "m"
    if not is_word(character):
        return " "
    found = script(character)
    return "c" if found in UNSPACED else "k" if found in _KATAKANA else "w"


def _base(text: str, cut: int) -> str:
    place = cut - 1
    while place > 0 and continues(text[place]):
        place -= 1
    return text[place]
