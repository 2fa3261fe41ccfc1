"""The answer that a response gives between braces: `\\mask{...}` and `\\boxed{...}`."""

from __future__ import annotations

import re


def last_braced(text: str, command: str) -> str | None:
    r"""What stands in the last balanced `\command{...}` of `text`, braces inside included; None where there is none.

    The last is the one that begins last, so a box inside a box is the answer. One that is never closed does not count.

    >>> last_braced(r"\mask{a} or \mask{b {c} d}, say", "mask")
    'b {c} d'
    >>> last_braced(r"\mask{Paris}. No: \mask{Lond", "mask")
    'Paris'
    >>> last_braced(r"\boxed{x", "boxed") is None
    True
    """
    opening = f"\\{command}{{"
    open_braces: list[tuple[int, bool]] = []  # (where the content begins, whether the command opened it)
    last: tuple[int, int] | None = None
    for token in re.finditer(re.escape(opening) + r"|[{}]", text):
        if token.group() != "}":
            open_braces.append((token.end(), token.group() == opening))
        elif open_braces:
            start, is_command = open_braces.pop()
            if is_command and (last is None or start > last[0]):
                last = (start, token.start())
    return text[last[0] : last[1]] if last else None


def is_balanced(text: str) -> bool:
    """True where every brace of `text` has its partner.

    >>> is_balanced("f{x}"), is_balanced("}{")
    (True, False)
    """
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0
