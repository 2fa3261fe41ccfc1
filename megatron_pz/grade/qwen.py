r"""Are two answers the same, by the semantics of Qwen2.5-Math's grader: as text, as numbers, part by part, by algebra.

1. A number may differ by one part in ten thousand, and may be the other's hundredfold or hundredth: 50 is 50% is 0.5.
2. Pairs, intervals, sets and lists are compared part by part, in the order given and **whatever their brackets**: `(1,2]` is
   `[1,2)` here, as there. (math-verify, whose verdict stands beside this one, tells them apart and knows sets.)
3. Matrices are compared entry by entry; an equation by the difference of its sides; `x=2` is 2.
4. What is left is for `symbolic.equal`, which may take long: call it where time is limited (`judge.Judge`).
"""

from __future__ import annotations

import re
from math import isclose

from megatron_pz.grade import symbolic
from megatron_pz.grade.clean import clean

TOLERANCE = 1e-4
_OPEN, _CLOSE = "\\begin{pmatrix}", "\\end{pmatrix}"


def equal(answer: str, target: str, *, keep_units: bool = False) -> bool:
    r"""Whether `answer` is `target`, both as written.

    >>> equal(r"\frac{1}{2}", "0.5"), equal("(1, 4.5)", r"(1,\frac{9}{2})"), equal("7", "8")
    (True, True, False)
    """
    return math_equal(clean(answer, keep_units=keep_units), clean(target, keep_units=keep_units))


def same_text(answer: str, target: str) -> bool:
    """Whether both are the same after cleaning: needs no algebra, so it cannot take long."""
    found, wanted = clean(answer), clean(target)
    return found != "" and (found.lower() == wanted.lower() or _numbers_agree(found, wanted))


def math_equal(answer: str, target: str) -> bool:
    """Whether two cleaned answers are equal."""
    answer, target = answer.strip(), target.strip()
    if not answer or not target:
        return answer == target != ""
    if answer.lower() == target.lower():
        return True
    if target in ("A", "B", "C", "D", "E") and _choice(answer) == target:
        return True
    if _number(target) is not None and _number(answer) is not None:
        return _numbers_agree(answer, target)
    if "pmatrix" in answer and "pmatrix" not in target:
        target = _as_matrix(target)
    if _bare(answer) == _bare(target):
        return True
    if _is_list(answer) and _is_list(target):
        return _all_equal(_parts(answer[1:-1]), _parts(target[1:-1]))
    if _is_set(answer) and _is_set(target):
        return _all_equal(_parts(answer[1:-1]), _parts(target[1:-1]))
    if _is_matrix(answer) and _is_matrix(target):
        return _all_equal(_entries(answer), _entries(target)) and _shape(answer) == _shape(target)
    if answer.count("=") == 1 and target.count("=") == 1:
        left, right = (_difference(side) for side in (answer, target))
        return symbolic.equal(left, right) or symbolic.equal(f"-({left})", right)
    for one, other in ((answer, target), (target, answer)):
        if one.count("=") == 1 and len(one.split("=")[0].strip()) <= 2 and "=" not in other:
            return math_equal(one.split("=")[1], other)
    return _lists_without_brackets(answer, target) or symbolic.equal(answer, target)


def _number(text: str) -> float | None:
    digits = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text.replace("{,}", ","))
    percent = digits.removesuffix("%").removesuffix("\\")
    try:
        return float(percent) / (100 if percent != digits else 1)
    except ValueError:
        return None


def _numbers_agree(answer: str, target: str) -> bool:
    found, wanted = _number(answer), _number(target)
    if found is None or wanted is None:
        return False
    return any(isclose(found, value, rel_tol=TOLERANCE) for value in (wanted / 100, wanted, wanted * 100))


def _choice(answer: str) -> str:
    letters = re.findall(r"\b[A-E]\b", answer.upper())
    return letters[-1] if letters else ""


def _bare(text: str) -> str:
    stripped = text.strip("[]()") if text[:1] + text[-1:] in ("[]", "()") and "," not in text else text
    return re.sub(r"[{}]", "", stripped).lower()


def _is_list(text: str) -> bool:
    return len(text) > 2 and text[0] in "([" and text[-1] in ")]" and len(_parts(text[1:-1])) > 1


def _is_set(text: str) -> bool:
    return len(text) > 2 and text[0] == "{" and text[-1] == "}"


def _is_matrix(text: str) -> bool:
    return text.startswith(_OPEN) and text.endswith(_CLOSE)


def _rows(matrix: str) -> list[list[str]]:
    inner = matrix.removeprefix(_OPEN).removesuffix(_CLOSE)
    return [[cell.strip() for cell in row.split("&")] for row in inner.split("\\\\") if row.strip()]


def _entries(matrix: str) -> list[str]:
    return [cell for row in _rows(matrix) for cell in row]


def _shape(matrix: str) -> list[int]:
    return [len(row) for row in _rows(matrix)]


def _as_matrix(text: str) -> str:
    inner = re.fullmatch(r"[({\[](.*,.*)[)}\]]", text)
    return f"{_OPEN}{inner[1].replace(',', chr(92) * 2)}{_CLOSE}" if inner else text


def _parts(text: str) -> list[str]:
    """Between commas that no bracket holds."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _all_equal(answers: list[str], targets: list[str]) -> bool:
    return len(answers) == len(targets) and all(map(math_equal, answers, targets))


def _lists_without_brackets(answer: str, target: str) -> bool:
    answers, targets = _parts(answer), _parts(target)
    return len(targets) > 1 and _all_equal(answers, targets)


def _difference(equation: str) -> str:
    left, right = equation.split("=")
    return f"{left.strip()}-({right.strip()})"
