"""From prompts back to paragraphs: `rollouts.jsonl` holds prompts as they were sent, and the page shows paragraphs.

What all prompts of a role have in common at both ends is the template (and the chat template around it).
"""

from __future__ import annotations

import os.path
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_pz.report.games import MASK_TOKEN

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands before and behind the paragraph in every prompt of a role."""

    before: str = ""
    behind: str = ""

    def open(self, prompt: str) -> str:
        """The paragraph in `prompt`; all of it where the frame does not fit.

        >>> Frame("<gen>", "").open("<gen>Paris is old.")
        'Paris is old.'
        """
        if len(prompt) < len(self.before) + len(self.behind):
            return prompt
        if not (prompt.startswith(self.before) and prompt.endswith(self.behind)):
            return prompt
        return prompt[len(self.before) : len(prompt) - len(self.behind)]


def find_frame(prompts: Iterable[str]) -> Frame:
    """The frame of `prompts`; empty where they are fewer than two.

    Paragraphs may begin or end alike (most end with a full stop): what is common is only taken up to a place where a
    template ends, that is a line end, a closing angle bracket or a colon, or from such a place on behind the paragraph.

    >>> find_frame(["<gen>The sea is deep.", "<gen>The sky is high."])
    Frame(before='<gen>', behind='')
    """
    different = sorted(set(prompts))
    if len(different) < 2:
        return Frame()
    before = os.path.commonprefix(different)
    cut = max(before.rfind(mark) + len(mark) if mark in before else 0 for mark in ("\n", ">", ": "))
    before = before[:cut]
    shortest = min(map(len, different)) - len(before)
    behind = os.path.commonprefix([prompt[::-1] for prompt in different])[::-1]
    behind = behind[max(0, len(behind) - shortest) :]
    starts = [place for mark in ("\n", "<") if (place := behind.find(mark)) >= 0]
    return Frame(before, behind[min(starts) :] if starts else "")


def hidden_spans(text: str, answer: str, masked_text: str | None) -> list[Span]:
    """Places of `answer` in `text` that are hidden, in characters.

    Args:
        masked_text: of a prediction prompt; None where there is none: then every occurrence.

    >>> hidden_spans("a b a", "a", "a b [mask]"), hidden_spans("a b a", "a", None), hidden_spans("a b a", "c", None)
    ([(4, 5)], [(0, 1), (4, 5)], [])
    """
    if not answer:
        return []
    if masked_text is not None and masked_text.replace(MASK_TOKEN, answer) == text:
        return _places(masked_text.split(MASK_TOKEN), len(answer))
    pieces = text.split(answer)
    return _places(pieces, len(answer))


def _places(pieces: list[str], length: int) -> list[Span]:
    spans, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        spans.append((at, at + length))
        at += length
    return spans
