"""What leaves nothing of a page, cut out before mwparserfromhell's tree is built, which is where the time goes.

1. References, comments and tables that hold no others, told by their tags alone.
2. Of a page whose braces, brackets and tags are closed in order: infoboxes, notes and other templates that stand on lines of their
   own, files and categories likewise, and lines of lists. Of any other page nothing more: how the parser mends broken markup, it
   alone knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(
    r"<ref(?:\s[^<>]*)?(?:/>|(?<!/)>[^<]*(?:<(?!/?ref[\s/>])[^<]*)*</ref\s*>)",  # none that holds the beginning of another
    re.IGNORECASE,
)
_TABLE = re.compile(r"(?m:^)([ \t:]*)\{\|[^\n]*(?:\n(?![ \t:]*(?:\{\||\|\}))[^\n]*)*\n[ \t]*\|\}(?!\})")
_CUT = "<ref/>"
"""Stands in place of what was cut out: it leaves nothing, and ends an address as what stood there did."""

_MARK = re.compile(r"\n|\{+|\}+|\[+|\]+|<(/?)([a-zA-Z][a-zA-Z0-9]*)(?:\s[^<>\n]*?)?(/?)>|<")
_LISTS = ("*", "#", ":", ";")
_VOID = frozenset({"br", "hr", "wbr"})
_CLOSING = {"[[": "]]", "[": "]"}
_TEMPLATE = re.compile(r"\{\{[ \t]*([^\W_][\w \-/'.,]*?)[ \t]*\n?[ \t]*(?:\||\}\})")
_LINK = re.compile(r"\[\[[ \t]*([^\n\[\]{}<>|:]+?)[ \t]*:[^\n\[\]{}<>|]*(?:\||\]\])")
_BLANK = re.compile(r"[ \t]*(?:\n|\Z)")
_DEEPEST = 30
"""Constructs in one another; the parser gives up at 40."""


def cut_out(text: str) -> str:
    """`text` without its references and those tables that hold no others.

    >>> cut_out("Amber<ref name=a/> is<ref>{{cite|b}}</ref> old.\\n{|\\n| a\\n|}")
    'Amber<ref/> is<ref/> old.\\n<ref/>'
    """
    return _TABLE.sub(rf"\1{_CUT}", _REFERENCE.sub(_CUT, _COMMENT.sub(_CUT, text)))


def blocks_cut_out(text: str, kept_templates: frozenset[str], dropped_links: frozenset[str]) -> str:
    """`text` without the blocks that leave nothing, each an empty line; as it is where something in it is not closed in order.

    Args:
        kept_templates: names, in lower case, of those that leave words.
        dropped_links: namespaces, in lower case, whose links leave none.

    >>> text = "{{Box\\n|a=[[b]]}}\\nAmber is old.\\n* a\\n* b\\n[[File:c.jpg|thumb|[[d]]]]\\n"
    >>> blocks_cut_out(text, frozenset(), frozenset({"file"}))
    '\\nAmber is old.\\n\\n\\n\\n'
    """
    pieces, done = [], 0
    for start, end in _blocks(text, kept_templates, dropped_links):
        pieces.append(text[done:start])
        done = end
    return "".join([*pieces, text[done:]])


def _blocks(text: str, kept: frozenset[str], dropped: frozenset[str]) -> list[tuple[int, int]]:
    """(start, end) of what is cut, in order; nothing where `text` is not closed in order."""
    spans: list[tuple[int, int]] = []
    closing: list[str] = []  # what ends each construct that is open
    line = 0  # where the line starts; -1 where that is inside of a construct
    first = -1  # where the outermost construct starts, if that is where its line does
    for kind, what, start, end in _marks(text):
        if kind == "line":
            if line >= 0 and not closing and text[line : line + 1] in _LISTS:
                spans.append((line, start))
            line = -1 if closing else end
        elif kind == "open":
            if not closing:
                first = start if start == line else -1
            closing.append(what)
        elif not closing or closing.pop() != what:
            return []
        elif not closing and first >= 0 and _leaves_nothing(text[first:end], kept, dropped) and _BLANK.match(text, end):
            spans.append((first, end))
        if len(closing) > _DEEPEST:
            return []
    return [] if closing else spans


def _leaves_nothing(block: str, kept: frozenset[str], dropped: frozenset[str]) -> bool:
    """Whether a template or link, from its beginning to its end, is surely read as one whose text is not kept."""
    if template := _TEMPLATE.match(block):
        return template[1].casefold() not in kept and "\n=" not in block  # a heading would take braces as text
    link = _LINK.match(block)
    return link is not None and link[1].casefold() in dropped


def _marks(text: str) -> Iterator[tuple[str, str, int, int]]:
    """("open" or "close", what closes it, start, end) of each construct, and ("line", "", start, end) of each end of a line, the
    last one's too. What cannot be told is a "close" of nothing."""
    for found in _MARK.finditer(text):
        mark, start, end = found[0], *found.span()
        if mark == "\n":
            yield "line", "", start, end
        elif mark[0] == "<":
            name = (found[2] or "").lower()
            is_void = bool(found[3]) or (name in _VOID and not found[1])
            if not is_void:
                yield "close" if found[1] or not name else "open", f"</{name}", start, end
        elif mark[0] in "{}" or (mark[0] == "]" and len(mark) > 2):  # pairs; of three the parser alone knows which two
            what = ("}}" if mark[0] in "{}" else "]]") if len(mark) % 2 == 0 else "?"
            for half in range(start, end, 2):
                yield "open" if mark[0] == "{" and what != "?" else "close", what, half, half + 2
        elif mark[0] == "[":
            yield ("open", _CLOSING[mark], start, end) if mark in _CLOSING else ("close", "?", start, end)
        else:
            yield "close", mark, start, end
    yield "line", "", len(text), len(text)
