"""Why a paragraph is left out for its language or its form. Each filter has a name, so that each can be counted."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Literal

from megatron_pz.corpus.wikitext import HOLE
from megatron_pz.words import script, words

SCRIPTS: dict[str, frozenset[str]] = {
    "ko": frozenset({"HANGUL", "CJK"}),
    "zh": frozenset({"CJK"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}),
    "ru": frozenset({"CYRILLIC"}),
    "uk": frozenset({"CYRILLIC"}),
    "el": frozenset({"GREEK"}),
    "ar": frozenset({"ARABIC"}),
    "fa": frozenset({"ARABIC"}),
    "he": frozenset({"HEBREW"}),
    "hi": frozenset({"DEVANAGARI"}),
    "th": frozenset({"THAI"}),
    **{code: frozenset({"LATIN"}) for code in "en de fr es it pt nl sv pl cs tr vi id fi da no ro hu ca".split()},
}
"""Scripts of a language's letters. Other codes: the filter by script is off."""

FUNCTION_WORDS = {
    "en": "the of and in is was to a for by with on are as that from",
    "de": "der die das und ist in von den mit auf ein eine war als für im zu des dem",
    "fr": "le la les et est de des en un une dans du par pour qui à au sur que",
    "es": "el la los y es de en un una del por que se las con para su al como",
    "it": "il la di e è che in un una del della per con da dei le gli nel",
    "pt": "o a os e é de em um uma do da que no na por com para foi dos das",
    "nl": "de het een en van in is op te dat die met voor was door als",
}
_SETS = {code: frozenset(listed.split()) for code, listed in FUNCTION_WORDS.items()}

QualityReason = Literal[
    "formula",  # a formula stood in it
    "leftover_markup",
    "few_letters",  # below 60% of what is not white space
    "wrong_script",  # below 80% of the letters are of the language's scripts (Korean: some must be Hangul)
    "wrong_language",  # another Latin language has more of its function words in it
    "no_sentence",  # does not end as a sentence
    "repetitive",  # one word is more than 30% of 20 words or more
]


def quality_reason(text: str, language: str = "") -> QualityReason | None:
    """The first filter that `text` fails; None where it passes.

    Args:
        language: code such as `en`; empty: the two filters by language are off.

    >>> quality_reason("Amber is the resin of old trees.", "en"), quality_reason("琥珀是古代樹脂形成的化石。", "ko")
    (None, 'wrong_script')
    """
    if HOLE in text:
        return "formula"
    if any(sign in text for sign in ("{{", "}}", "[[", "]]", "{|", "|}", "<ref", "</")):
        return "leftover_markup"
    solid = Counter("".join(text.split()))  # each character is looked at once: a text has few different ones
    letters = {character: number for character, number in solid.items() if character.isalpha()}
    num_letters = sum(letters.values())
    marks = sum(number for character, number in solid.items() if unicodedata.category(character).startswith("M"))
    if num_letters + marks < 0.6 * solid.total():
        return "few_letters"
    if (wanted := SCRIPTS.get(language)) is not None:
        found: Counter[str] = Counter()
        for character, number in letters.items():
            found[script(character)] += number
        if sum(found[name] for name in wanted) < 0.8 * num_letters or (language == "ko" and not found["HANGUL"]):
            return "wrong_script"
    if (
        not text.rstrip("\"'’”»)]）」』》").endswith((".", "!", "?", "…", "。", "！", "？", "।", "؟", "۔"))
        and language != "th"
    ):
        return "no_sentence"
    counts = Counter(text[a:b].casefold() for a, b in words(text))
    num_words = counts.total()
    if language in _SETS and num_words >= 12:
        hits = {code: sum(counts[word] for word in listed) for code, listed in _SETS.items()}
        if hits[language] < max(hits.values()):
            return "wrong_language"
    if num_words >= 20 and max(counts.values()) > 0.3 * num_words:
        return "repetitive"
    return None
