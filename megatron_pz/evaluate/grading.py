"""Verdicts about responses: every grader of the suite's kind, each by its name."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from megatron_pz.evaluate.suites.formats import Question
from megatron_pz.evaluate.suites.table import Suite
from megatron_pz.game.braces import last_braced
from megatron_pz.grade.bbeh import extract_bbeh, matches_bbeh
from megatron_pz.grade.choices import lenient_letter, mmlu_pro_letter, strict_letter
from megatron_pz.grade.extract import extract_math
from megatron_pz.grade.judge import Judge, Verdict


@dataclass(frozen=True, slots=True)
class Graded:
    """What the graders say of one response."""

    answer: str | None  # as the headline grader read it
    is_found: bool  # the response announces an answer: a box or a phrase
    scores: dict[str, float]  # by grader, 0 or 1
    faults: dict[str, str] = field(default_factory=dict)  # graders that could not find out, which score 0


class Grader(Protocol):
    """Judges the responses to questions of one kind."""

    def __call__(self, question: Question, response: str, judge: Judge) -> Graded:
        """What the graders of one kind say."""
        ...


def grade_choice(question: Question, response: str, judge: Judge) -> Graded:
    """`strict`: one letter is all that is boxed; `mmlu_pro`: the official patterns; `lenient`: General-Reasoner's scan."""
    strict = strict_letter(response)
    found = {"strict": strict, "mmlu_pro": mmlu_pro_letter(response), "lenient": lenient_letter(response)}
    return Graded(strict, strict is not None, {name: float(is_ == question.target) for name, is_ in found.items()})


def grade_bbeh(question: Question, response: str, judge: Judge) -> Graded:
    """`bbeh`: its own fuzzy matching."""
    answer = extract_bbeh(response)
    return Graded(answer, answer is not None, {"bbeh": float(matches_bbeh(answer, question.target))})


def grade_math(question: Question, response: str, judge: Judge) -> Graded:
    """`qwen`: Qwen2.5-Math's semantics; `math_verify`: that library, on the last box or, without one, on the whole response."""
    found = extract_math(response)
    boxed = last_braced(response, "boxed")
    whole = response if boxed is None else f"\\boxed{{{boxed}}}"
    verdicts: dict[str, Verdict] = {
        "qwen": judge("qwen", found.answer, question.target) if found.answer else Verdict(False),
        "math_verify": judge("math_verify", whole, question.target),
    }
    return Graded(
        found.answer or None,
        found.is_announced,
        {name: float(verdict.right) for name, verdict in verdicts.items()},
        {name: verdict.fault for name, verdict in verdicts.items() if verdict.fault},
    )


GRADERS: dict[str, Grader] = {"choice": grade_choice, "bbeh": grade_bbeh, "math": grade_math}


def grade_all(suite: Suite, asked: Sequence[tuple[Question, str]], judge: Judge, num_threads: int = 2) -> list[Graded]:
    """What the suite's graders say of each (question, response), in order."""
    grader = GRADERS[suite.kind]
    if suite.kind != "math":
        return [grader(question, response, judge) for question, response in asked]
    with ThreadPoolExecutor(num_threads) as threads:
        return list(threads.map(lambda pair: grader(pair[0], pair[1], judge), asked))
