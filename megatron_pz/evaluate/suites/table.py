"""The paper's nine test sets: where each is published, how it is asked, how it is graded, what is averaged (paper 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["choice", "bbeh", "math"]


@dataclass(frozen=True)
class Suite:
    """One test set."""

    name: str
    kind: Kind  # what its answers are, and so its prompt and its graders
    hub: str  # data set on the Hugging Face hub; empty: local files only
    hub_config: str = "default"
    split: str = "test"
    num_questions: int = 0  # published size
    num_samples: int = 1  # answers a question; 1: greedy
    temperature: float = 0.0


def _greedy(name: str, kind: Kind, hub: str, size: int, config: str = "default", split: str = "test") -> Suite:
    return Suite(name, kind, hub, config, split, size)


SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        _greedy("mmlu_pro", "choice", "TIGER-Lab/MMLU-Pro", 12032),
        _greedy("supergpqa", "choice", "m-a-p/SuperGPQA", 26529, split="train"),
        _greedy("bbeh", "bbeh", "BBEH/bbeh", 4520, split="train"),
        _greedy("math500", "math", "HuggingFaceH4/MATH-500", 500),
        _greedy("olympiad", "math", "Hothan/OlympiadBench", 675, "OE_TO_maths_en_COMP", "train"),
        _greedy("minerva", "math", "math-ai/minervamath", 272),
        _greedy("gsm8k", "math", "openai/gsm8k", 1319, "main"),
        Suite("amc23", "math", "math-ai/amc23", "default", "test", 40, 32, 1.0),
        Suite("aime24", "math", "HuggingFaceH4/aime_2024", "default", "train", 30, 32, 1.0),
        # The 5,000 questions that Qwen's harness calls "math"; in no average (docs/evaluation.md).
        _greedy("math", "math", "", 5000),
    )
}

MATH = ("math500", "olympiad", "minerva", "gsm8k", "amc23", "aime24")
GENERAL = ("supergpqa", "bbeh", "mmlu_pro")
PAPER = (*GENERAL, *MATH)

AVERAGES: Mapping[str, tuple[str, ...]] = {"math_average": MATH, "general_average": GENERAL}
"""Plain means of suites."""

OVERALL = "overall"
"""The plain mean of the math average and the three general suites: mathematics counts once."""

HEADLINE: Mapping[Kind, str] = {"choice": "strict", "bbeh": "bbeh", "math": "qwen"}
"""The grader whose score stands for a suite in averages and curves; the others stand beside it."""
