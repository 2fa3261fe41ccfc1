r"""Algebra: are two formulas of LaTeX (or plain ASCII) equal? May take for ever; `judge.Judge` ends it.

Text is read by a LaTeX grammar and never evaluated as Python: a response is not to be trusted.
"""

from __future__ import annotations

import re
from math import isclose
from typing import Any

MAX_CHARS = 400
"""A longer formula is not read."""

_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp"


def equal(answer: str, target: str) -> bool:
    """Whether both are formulas, and equal."""
    if max(len(answer), len(target)) > MAX_CHARS:
        return False
    found, wanted = read(answer), read(target)
    if found is None or wanted is None:
        return False
    return _equal(found, wanted)


def read(text: str) -> Any:
    """The sympy object of a formula, or None."""
    from antlr4.error.Errors import RecognitionException
    from latex2sympy2_extended import latex2sympy
    from sympy import SympifyError

    try:
        return latex2sympy(_as_latex(text))
    except (RecognitionException, SympifyError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None
    except Exception:  # noqa: BLE001 - the grammar raises bare exceptions for what is no formula
        return None


def _as_latex(text: str) -> str:
    """ASCII notation as LaTeX; LaTeX as it is."""
    found = text.replace("**", "^").replace("π", "\\pi").replace("√", "\\sqrt ")
    found = re.sub(r"(?<![\\a-zA-Z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", found)
    found = re.sub(rf"(?<![\\a-zA-Z])({_FUNCTIONS})(?=[\s(])", r"\\\1", found)
    found = re.sub(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi", found)
    return re.sub(r"\*", r"\\cdot ", found)


def _equal(found: Any, wanted: Any) -> bool:
    import sympy

    if isinstance(found, sympy.MatrixBase) or isinstance(wanted, sympy.MatrixBase):
        return (
            isinstance(found, sympy.MatrixBase)
            and isinstance(wanted, sympy.MatrixBase)
            and found.shape == wanted.shape
            and all(_equal(a, b) for a, b in zip(found, wanted, strict=True))
        )
    try:
        if found == wanted:
            return True
        if isinstance(found, sympy.Expr) and isinstance(wanted, sympy.Expr):
            if not found.free_symbols and not wanted.free_symbols and _close(found, wanted):
                return True
            return bool(found.equals(wanted)) or sympy.simplify(found - wanted) == 0
        if isinstance(found, sympy.Eq) and isinstance(wanted, sympy.Eq):
            one, other = found.lhs - found.rhs, wanted.lhs - wanted.rhs
            return sympy.simplify(one - other) == 0 or sympy.simplify(one + other) == 0
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError):
        return False
    return False


def _close(found: Any, wanted: Any) -> bool:
    try:
        one, other = complex(found.evalf()), complex(wanted.evalf())
    except (TypeError, ValueError, OverflowError):
        return False
    return isclose(one.real, other.real, rel_tol=1e-4) and isclose(one.imag, other.imag, rel_tol=1e-4)
