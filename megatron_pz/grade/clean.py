r"""An answer as Qwen2.5-Math's grader compares it: units, signs of currency and the accidents of LaTeX taken away.

Written anew from its rules; where it differs (docs/evaluation.md): letters that may be variables are kept where
the original takes them for units; numbers in words count only where the whole answer is one.
"""

from __future__ import annotations

import re

from megatron_pz.grade.units import number_of_words, without_units

_SAME = (
    ("\\!", ""),
    ("\\,", ""),
    ("\\;", ""),
    ("bmatrix", "pmatrix"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("cfrac", "frac"),
    ("\\neq", "\\ne"),
    ("\\leq", "\\le"),
    ("\\geq", "\\ge"),
    ("\\left", ""),
    ("\\right", ""),
    ("\\{", "{"),
    ("\\}", "}"),
)
_NAMES = tuple(f"{variable}{sign}" for variable in "xyz" for sign in ("=", "\\in", "\\to"))


def clean(answer: str, *, keep_units: bool = False) -> str:
    r"""What is compared.

    >>> clean(r"\dfrac{1}{2}\text{ cm}"), clean("$1,234.00$"), clean("x = 7."), clean("50\\%")
    ('\\frac{1}{2}', '1,234', '7', '50')
    """
    text = answer.strip().replace("\n", "").rstrip(".")
    text = re.sub(r"\\(begin)\{array\}\{.*?\}", r"\\begin{pmatrix}", text).replace("\\end{array}", "\\end{pmatrix}")
    for found, wanted in _SAME:
        text = text.replace(found, wanted)
    text = _or_itself(re.sub(r"\\(?:text|mbox)\{[^{}]*\}$", "", text), text)
    if not keep_units:
        text = without_units(text)
    text = re.sub(r"\^\{?\\circ\}?|°", "", text)
    text = text.replace("\\$", "").replace("$", "").replace("\\(", "").replace("\\)", "").strip()
    if (number := number_of_words(text)) is not None:
        text = str(number)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{(.*?)\}", r"\1", text).replace("\\mathbf", "")
    text = re.sub(r"\\mbox\{.*?\}", "", text)
    text = re.sub(r"\s*(=|\\in|\\to)\s*(?![a-z])", r"\1", text)
    for name in _NAMES:
        text = text.replace(name, "")
    text = text.replace("\\emptyset", "{}").replace("(-\\infty,\\infty)", "\\mathbb{R}")
    text = text.replace("\\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    if "\\infty" not in text:
        text = re.sub(r"\b(?:infinity|inf)\b", r"\\infty", text)
    text = re.sub(r"(?<![a-zA-Z\\])and(?![a-zA-Z])", "", text)
    if "j" in text and "i" not in text:
        text = text.replace("j", "i")
    text = re.sub(r"(\d)\.0+(?=\D|$)", r"\1", text)  # 3.0 is 3
    text = re.sub(r"(\d)\.(?=\s|$)", r"\1", text)
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0].strip()) <= 2 and sides[1].strip():
        text = sides[1]
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", "")
    return _slash(_fractions(text))


def _or_itself(shorter: str, text: str) -> str:
    return shorter.strip() or text


def _fractions(text: str) -> str:
    r"""Braces around the parts of `\frac12` and the like."""
    head, *tails = text.split("\\frac")
    if not tails:
        return text
    made = [head]
    for tail in tails:
        if not tail.startswith("{") and len(tail) < 2:
            return text
        if not tail.startswith("{"):
            top, rest = tail[0], tail[1:]
            tail = f"{{{top}}}{rest}" if rest.startswith("{") else f"{{{top}}}{{{rest[0]}}}{rest[1:]}"
        else:
            end = tail.find("}")
            rest = tail[end + 1 :]
            if end > 0 and tail.count("{", 0, end) == 1 and rest[:1].isdigit():
                tail = f"{tail[: end + 1]}{{{rest[0]}}}{rest[1:]}"
        made.append("\\frac" + tail)
    return "".join(made)


def _slash(text: str) -> str:
    whole = re.fullmatch(r"(-?\d+)/(\d+)", text)
    return f"\\frac{{{whole[1]}}}{{{whole[2]}}}" if whole else text
