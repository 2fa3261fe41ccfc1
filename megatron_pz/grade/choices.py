"""Which letter a response to a multiple-choice question names, by three rules of different strictness."""

from __future__ import annotations

import re

from megatron_pz.game.braces import last_braced

LETTERS = "ABCDEFGHIJ"
_PHRASES = ("final answer:", "the answer is:", "the answer is", "answer:")
_ONE_LETTER = re.compile(r"[\s*$(\[{.:]*(?:\\(?:text|textbf|mathrm|mathbf)\{)?[(\[]?([A-J])[)\]]?[\s*$)\]}.:]*")


def strict_letter(response: str) -> str | None:
    r"""The letter that is all that the last box holds, bracketed or not; without a box, that opens what follows a phrase.

    >>> strict_letter(r"\boxed{(C)}"), strict_letter(r"\boxed{\text{B}}"), strict_letter("The answer is (D).")
    ('C', 'B', 'D')
    >>> strict_letter(r"\boxed{A and B}") is None, strict_letter(r"\boxed{Carbon}") is None
    (True, True)
    """
    boxed = last_braced(response, "boxed")
    if boxed is not None:
        found = _ONE_LETTER.fullmatch(boxed)
        return found[1] if found else None
    lowered = response.lower()
    for phrase in _PHRASES:
        if (place := lowered.rfind(phrase)) >= 0:
            after = re.match(r"[\s*:$]*(?:\\boxed\{)?[(\[]?([A-J])(?![\w'])", response[place + len(phrase) :])
            return after[1] if after else None
    return None


def mmlu_pro_letter(response: str) -> str | None:
    """By the official harness of MMLU-Pro: "answer is (X)", else "Answer: X", else the last capital that stands alone.

    >>> mmlu_pro_letter("the answer is (B). I am sure"), mmlu_pro_letter("Answer: C"), mmlu_pro_letter("so I take E")
    ('B', 'C', 'E')
    """
    if found := re.search(r"answer is \(?([A-J])\)?", response):
        return found[1]
    if found := re.search(r".*[aA]nswer:\s*([A-J])", response):
        return found[1]
    alone = re.findall(r"\b([A-J])\b", response)
    return alone[-1] if alone else None


def lenient_letter(response: str) -> str | None:
    r"""By General-Reasoner's evaluation: of the letters in the box (or behind a phrase), the first of the alphabet.

    >>> lenient_letter(r"\boxed{Because}"), lenient_letter(r"\boxed{none}") is None
    ('B', True)
    """
    found = last_braced(response, "boxed")
    if found is None:
        lowered = response.lower()
        places = [lowered.rfind(phrase) + len(phrase) for phrase in _PHRASES[:2] if phrase in lowered]
        if not places:
            return None
        found = response[max(places) :]
    return next((letter for letter in LETTERS if letter in found), None)
