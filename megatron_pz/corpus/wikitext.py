"""Paragraphs of plain text out of wikitext, by mwparserfromhell's tree.

1. Templates, tables, references, galleries, files, categories, comments, headings and list items leave nothing.
2. A few templates hold words of the sentence (`convert`, `lang`, `nowrap`): their words stay.
3. What is dropped whole and can be told without the tree is cut out before it is built (`wikitext_cut`); pages that quote markup
   are parsed as they are.
4. A formula leaves `HOLE` behind, so that its paragraph can be left out and counted.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import mwparserfromhell
from mwparserfromhell import nodes

from megatron_pz.corpus.wikitext_cut import blocks_cut_out, cut_out

HOLE = "\ufffc"
"""Stands where something that cannot be text was."""

_DROPPED = frozenset(
    "ref references table gallery timeline score imagemap hiero chem syntaxhighlight source pre ol ul li dl dt dd div "
    "style templatestyles noinclude includeonly mapframe graph poem blockquote section".split()
)
_FORMULA = frozenset({"math", "ce", "chem"})
_WORDS_AT = {"nowrap": 0, "lang": 1, "transl": -1, "small": 0, "nobold": 0, "em": 0, "strong": 0, "abbr": 0}
_SIGNS = {"ndash": "–", "mdash": "—", "snd": " – ", "spnd": " – ", "'": "'", "'s": "'s", "nbsp": " ", "·": "·"}
_AMOUNTS, _FORMULAS = ("convert", "cvt"), ("frac", "math", "mvar", "chem")
KEPT_TEMPLATES = frozenset({*_SIGNS, *_WORDS_AT, *_AMOUNTS, *_FORMULAS})
"""Templates that leave something in the text."""
_LIST = "\x00"
_QUOTES = re.compile(r"'{2,}")
_QUOTED = re.compile(r"<(?:nowiki|pre|syntaxhighlight|source)\b", re.IGNORECASE)
_MAGIC = re.compile(r"__[A-Z]+__")


def wiki_paragraphs(text: str, dropped_links: tuple[str, ...] = ("File", "Image", "Category")) -> list[str]:
    """The paragraphs of a page, in order, cleaned; empty ones left out.

    Args:
        dropped_links: namespaces whose links show nothing in the text.

    >>> wiki_paragraphs("{{Box}}'''Amber''' is [[Resin|resin]].<ref>x</ref>\\n* item\\n\\n== A ==\\nIt ''burns''.")
    ['Amber is resin.', 'It burns.']
    """
    dropped = frozenset(name.casefold() for name in dropped_links)
    if not _QUOTED.search(text):
        text = blocks_cut_out(cut_out(text), KEPT_TEMPLATES, dropped)
    plain = _plain(mwparserfromhell.parse(text, skip_style_tags=True), dropped)
    paragraphs, held = [], []
    for line in [*plain.split("\n"), ""]:
        if line.strip() and line[0] not in "*#:;|!{ " and not line.startswith((_LIST, "}", "----")):
            held.append(line.strip())
        elif held:
            paragraphs.append(_mended(" ".join(held)))
            held = []
    return [paragraph for paragraph in paragraphs if paragraph]


def _plain(tree: Any, dropped: frozenset[str]) -> str:
    return "".join(_node(node, dropped) for node in tree.nodes)


def _node(node: Any, dropped: frozenset[str]) -> str:
    if isinstance(node, nodes.Text):
        return str(node.value)
    if isinstance(node, nodes.Wikilink):
        title = str(node.title).strip()
        space, colon, _ = title.partition(":")
        if colon and (space.strip().casefold() in dropped or re.fullmatch(r"[a-z]{2,3}(-[a-z]+)*", space)):
            return ""
        return _plain(node.text, dropped) if node.text is not None else title.removeprefix(":").split("#")[0]
    if isinstance(node, nodes.ExternalLink):
        return _plain(node.title, dropped) if node.title is not None else ""
    if isinstance(node, nodes.HTMLEntity):
        return str(node.normalize()).replace("\n", " ")
    if isinstance(node, nodes.Heading):
        return "\n\n"
    if isinstance(node, nodes.Tag):
        return _tag(node, dropped)
    return _template(node, dropped) if isinstance(node, nodes.Template) else ""


def _tag(node: Any, dropped: frozenset[str]) -> str:
    name = str(node.tag).strip().casefold()
    if node.wiki_markup in ("*", "#", ";", ":"):
        return _LIST
    if name == "br":
        return " "
    if name in _FORMULA:
        return HOLE
    if name in _DROPPED or node.contents is None:
        return ""
    return _plain(node.contents, dropped)


def _template(node: Any, dropped: frozenset[str]) -> str:
    name = str(node.name).strip().casefold()
    given = [parameter.value for parameter in node.params if not parameter.showkey]
    if name in _SIGNS:
        return _SIGNS[name]
    if name in _AMOUNTS and len(given) > 1:
        return f"{_plain(given[0], dropped).strip()} {_plain(given[1], dropped).strip()}"
    if name in _FORMULAS:
        return HOLE
    place = _WORDS_AT.get(name)
    if place is not None and given and place < len(given):
        return _plain(given[place], dropped)
    return ""


def _mended(text: str) -> str:
    """Without what markup leaves behind: quote marks, empty brackets, blanks before stops."""
    text = _MAGIC.sub("", _QUOTES.sub("", unicodedata.normalize("NFC", text)))
    text = text.replace(_LIST, " ").replace("\u00ad", "").replace("\u200b", "").replace("\u200e", "")
    text = re.sub(r"[([（][\s,;:，；：]*[)\]）]", "", text)
    text = re.sub(r"([(（])[\s,;，；]+", r"\1", text)
    text = re.sub(r"[\s,;]+([)）])", r"\1", text)
    return re.sub(r" ([,.;:!?])(?=\s|$)", r"\1", " ".join(text.split()))
