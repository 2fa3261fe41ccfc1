"""What an answer that is paid is called, and one that is not."""

from __future__ import annotations


def verdicts(task: str) -> tuple[str, str]:
    """(paid, not paid): `format_only` pays whatever can be read, the other tasks what is right.

    >>> verdicts("format_only"), verdicts("random_span")
    (('readable', 'unreadable'), ('right', 'wrong'))
    """
    return ("readable", "unreadable") if task == "format_only" else ("right", "wrong")
