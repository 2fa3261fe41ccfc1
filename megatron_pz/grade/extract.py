r"""Where a response gives its answer, by the rules of Qwen2.5-Math's grader: the last box, else an announcing phrase, else
the last number."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_pz.game.braces import last_braced

_PHRASES = ("he answer is", "final answer is", "答案是")


@dataclass(frozen=True, slots=True)
class Extracted:
    """An answer, and whether the response announced it (a box or a phrase) or it is only the last number."""

    answer: str
    is_announced: bool


def extract_math(response: str) -> Extracted:
    r"""The answer of a response to a question of mathematics, not yet cleaned; "" where there is none.

    >>> extract_math(r"so \boxed{\frac{1}{2}}.")
    Extracted(answer='\\frac{1}{2}', is_announced=True)
    >>> extract_math("The answer is: 1,000.").answer, extract_math("3 + 4 = 7 apples")
    ('1,000', Extracted(answer='7', is_announced=False))
    """
    if "boxed" in response:
        return Extracted(_tidy(_boxed(response)), True)
    for phrase in _PHRASES:
        if phrase in response:
            after = response.split(phrase)[-1].strip()
            return Extracted(_tidy(after.split("\n\n")[0]), True)
    numbers = re.findall(r"-?\d*\.?\d+", response.replace(",", ""))
    return Extracted(numbers[-1] if numbers else "", False)


def _boxed(response: str) -> str:
    found = last_braced(response, "boxed")
    if found is not None:
        return found
    rest = response.split("boxed")[-1]
    # A box that was never closed holds all that follows; one without braces ends with the formula.
    return rest[1:] if rest.startswith("{") else rest.split("$")[0].strip()


def _tidy(answer: str) -> str:
    return re.sub(r"\n\s*", "", answer).strip().removeprefix(":").strip().removesuffix(".").removesuffix("/").strip()
