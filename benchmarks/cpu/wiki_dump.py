"""A Wikipedia dump of a real one's format, made of real text: what `corpus.py` reads.

Each lead becomes a page with what editors put around text: an infobox, links, references with citations in them, a list, files,
categories, headings; three in ten have a table. A third of the pages are redirects. Texts are taken again, with one word in six
drawn anew, until the dump is as long as wanted, so that few paragraphs are equal. Streams of 100 pages, as in a multistream dump.
"""

from __future__ import annotations

import bz2
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <dbname>enwiki</dbname>
    <base>https://en.wikipedia.org/wiki/Main_Page</base>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">File</namespace>
      <namespace key="14" case="first-letter">Category</namespace>
    </namespaces>
  </siteinfo>
"""
PAGE = """  <page>
    <title>{title}</title>
    <ns>0</ns>
    <id>{id}</id>{redirect}
    <revision>
      <id>{revision}</id>
      <parentid>{parent}</parentid>
      <timestamp>2026-01-02T03:04:05Z</timestamp>
      <contributor><username>Editor {id}</username><id>{parent}</id></contributor>
      <comment>copy edit</comment>
      <model>wikitext</model>
      <format>text/x-wiki</format>
      <text bytes="{size}" xml:space="preserve">{text}</text>
      <sha1>{sha}</sha1>
    </revision>
  </page>
"""
CITE = (
    '<ref name="r{n}">{{{{cite web |url=https://example.org/{n} |title={a} {b} |last={a} |first=A. |date=2019-0{m}-11 '
    "|publisher=[[{b}]]}}}}</ref>"
)


def write_dump(leads: Path, out: Path, num_bytes: int, seed: int = 1) -> dict[str, int]:
    """Writes `out`; pages, bytes of XML and of the file."""
    rows = [json.loads(line) for line in leads.read_text(encoding="utf-8").splitlines()]
    rng = random.Random(seed)
    pages = made = 0
    with out.open("wb") as file:
        held = HEAD
        for page in _pages(rows, rng):
            held += page
            pages += 1
            if pages % 100 == 0:
                data = held.encode()
                file.write(bz2.compress(data))
                made, held = made + len(data), ""
                if made >= num_bytes:
                    break
        data = f"{held}</mediawiki>\n".encode()
        file.write(bz2.compress(data))
    return {"pages": pages, "xml_bytes": made + len(data), "file_bytes": out.stat().st_size}


def _pages(rows: list[dict[str, Any]], rng: random.Random) -> Iterator[str]:
    vocabulary = [word for row in rows[::20] for word in row["text"].split() if word.isalpha() and word.islower()]
    number = turn = 0
    while True:
        for row in rows:
            number += 1
            title = f"{row['title']} ({turn})" if turn else row["title"]
            yield _page(number, title, wikitext(row["text"], title, vocabulary, rng, changed=turn > 0))
            if number % 2 == 0:
                yield _page(
                    10_000_000 + number,
                    f"{title} (old)",
                    f"#REDIRECT [[{title}]]",
                    f'\n    <redirect title="{escape(title)}" />',
                )
        turn += 1


def _page(number: int, title: str, text: str, redirect: str = "") -> str:
    return PAGE.format(
        title=escape(title), id=number, redirect=redirect, revision=9 * number, parent=7 * number, size=len(text.encode()),
        text=escape(text), sha=f"{number:031x}",
    )  # fmt: skip


def wikitext(text: str, title: str, vocabulary: list[str], rng: random.Random, *, changed: bool) -> str:
    """The lead `text` as editors might have written it, and sections of its sentences behind it."""
    sentences = text.replace("? ", "?. ").split(". ")
    body = []
    for place in range(0, len(sentences), 3):
        words = " ".join(f"{one.rstrip('.')}." for one in sentences[place : place + 3]).split()
        for at, word in enumerate(words):
            if word.isalpha() and word.islower() and changed and rng.random() < 1 / 6:
                words[at] = rng.choice(vocabulary)
            elif word.isalpha() and len(word) > 4 and rng.random() < 0.12:
                words[at] = f"[[{word}]]" if rng.random() < 0.5 else f"[[{rng.choice(vocabulary)} ({word})|{word}]]"
            elif word.endswith(".") and rng.random() < 0.8:
                n = rng.randrange(10**6)
                words[at] = word + CITE.format(n=n, a=rng.choice(vocabulary), b=rng.choice(vocabulary), m=1 + n % 9)
        body.append(" ".join(words))
    first, *others = body
    fields = "".join(
        f"| {rng.choice(vocabulary)} = [[{rng.choice(vocabulary)}]] {{{{small|({n})}}}}\n" for n in range(8)
    )
    cells = "".join(
        f"|-\n| {rng.choice(vocabulary)} || {{{{nowrap|{n} km}}}} || [[{rng.choice(vocabulary)}]]\n" for n in range(6)
    )
    parts = [
        f"{{{{Short description|{title}}}}}\n{{{{Infobox thing\n| name = {title}\n{fields}}}}}\n'''{title}''' {first}"
    ]
    for number, paragraph in enumerate(others):
        head = f"== {rng.choice(vocabulary).title()} ==\n" if number % 2 == 0 else ""
        file = f"[[File:{title}.jpg|thumb|right|The [[{rng.choice(vocabulary)}]] of it.]]\n" if number % 3 == 0 else ""
        parts.append(f"{head}{file}{paragraph}")
    if rng.random() < 0.3:
        parts.append(f'{{| class="wikitable sortable"\n! a !! b !! c\n{cells}|}}')
    parts.append("== See also ==\n" + "\n".join(f"* [[{rng.choice(vocabulary)}]]" for _ in range(4)))
    parts.append("== References ==\n{{Reflist}}\n{{Authority control}}\n[[Category:Things]]\n[[Category:Old things]]")
    return "\n\n".join(parts)
