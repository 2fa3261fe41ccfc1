r"""BIG-Bench Extra Hard's matching, written anew from its rules: lower case, LaTeX unwrapped, an option's letter with or without
brackets, equal numbers, quotes, a bracket around all, a last question mark."""

from __future__ import annotations

import re

from megatron_pz.game.braces import last_braced

_PHRASES = ("the final answer is", "the answer is")


def extract_bbeh(response: str) -> str | None:
    r"""What the response gives as its answer: the last box, else what follows the last announcing phrase; else None.

    >>> extract_bbeh(r"... \boxed{\text{(A)}}"), extract_bbeh("The answer is: yes, no.\nThat is all."), extract_bbeh("yes")
    ('(a)', 'yes,no', None)
    """
    found = last_braced(response, "boxed")
    if found is None:
        lowered = response.lower()
        places = [lowered.rfind(phrase) + len(phrase) for phrase in _PHRASES if phrase in lowered]
        if not places:
            return None
        found = response[max(places) :].lstrip(": ").split("\n")[0]
    return normalise_bbeh(found)


def normalise_bbeh(text: str) -> str:
    """`text` as it is compared."""
    found = text.strip().removesuffix(".").strip()
    if found.startswith("$") and found.endswith("$") and len(found) > 1:
        found = found[1:-1]
    while wrapped := re.fullmatch(r"\\(?:boxed|text|texttt|textbf|mathrm)\{(.*)\}", found, flags=re.DOTALL):
        found = wrapped[1]
    return found.lower().replace(", ", ",").replace("**", "").strip().split("\n")[0].removesuffix(".")


def matches_bbeh(answer: str | None, target: str) -> bool:
    """Whether an extracted answer is the target.

    >>> matches_bbeh("a", "(A)"), matches_bbeh("2.0", "2"), matches_bbeh("[1,2]", "1, 2"), matches_bbeh("no", "yes")
    (True, True, True, False)
    """
    if answer is None:
        return False
    wanted = normalise_bbeh(target)
    if answer == wanted or answer.replace("'", "") == wanted.replace("'", ""):
        return True
    if _letter(answer) is not None or _letter(wanted) is not None:
        return (_letter(answer) or answer) == (_letter(wanted) or wanted)
    try:
        if float(answer) == float(wanted):
            return True
    except ValueError:
        pass
    return f"[{wanted}]" == answer or f"[{answer}]" == wanted or answer.removesuffix("?") == wanted


def _letter(text: str) -> str | None:
    return text[1] if len(text) == 3 and text[0] == "(" and text[2] == ")" else None
