"""A language model as the judge of an answer (General-Reasoner): its prompt, its verdict, and what a right answer is paid.

The prompt has the shape that the general-verifier was trained on (three headed fields, then the task, then the turn of the
assistant); whoever wants its authors' very words puts them into a file and names it (`verifier_template`).
"""

from __future__ import annotations

from pathlib import Path

from megatron_pz.errors import TemplateError

YES = "Final Decision: Yes"
TEMPLATE = """User: ### Question: {question}

### Ground Truth Answer: {truth}

### Student Answer: {answer}

Compare the student's answer with the ground truth answer to the question above. Do not work out the question yourself: only say
whether the two answers mean the same. End with the line "Final Decision: Yes" if they do, or "Final Decision: No" if they do \
not. Assistant:"""
_PLACES = ("{question}", "{truth}", "{answer}")


def load_template(path: str) -> str:
    """The prompt in the file `path`; empty: the package's own.

    Raises:
        TemplateError: it cannot be read, or lacks a placeholder.
    """
    if not path:
        return TEMPLATE
    try:
        text = Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"--verifier-template {path} cannot be read as UTF-8 text: {error}.") from error
    if missing := [place for place in _PLACES if place not in text]:
        raise TemplateError(
            f"The verifier's template {path} lacks {', '.join(missing)}. Put each where it is to stand."
        )
    return text


def verifier_prompt(template: str, question: str, truth: str, answer: str) -> str:
    """What the verifier reads; the texts may themselves hold what looks like a placeholder.

    >>> verifier_prompt("{question}|{truth}|{answer}", "{truth}?", "1", "2")
    '{truth}?|1|2'
    """
    parts, values = [template], dict(zip(_PLACES, (question, truth, answer), strict=True))
    for place in _PLACES:
        parts = [piece for part in parts for piece in (_split(part, place) if part not in _PLACES else [part])]
    return "".join(values.get(part, part) for part in parts)


def _split(part: str, place: str) -> list[str]:
    pieces = part.split(place)
    return [piece for at, text in enumerate(pieces) for piece in ((place, text) if at else (text,))]


def says_yes(output: str) -> bool:
    """Whether the verifier finds the answer right.

    >>> says_yes("Both are 7. Final Decision: Yes"), says_yes("Final Decision: No"), says_yes("I am not sure")
    (True, False, False)
    """
    return YES in output


def right_answer_reward(answer_tokens: int, truth_tokens: int, penalty: float, cap: int) -> float:
    """What a right answer is paid: less for each token that it is longer or shorter than the reference.

    >>> right_answer_reward(5, 5, 0.05, 10), right_answer_reward(7, 5, 0.05, 10), right_answer_reward(99, 5, 0.05, 10)
    (1.0, 0.9, 0.5)
    """
    return 1.0 - penalty * min(cap, abs(answer_tokens - truth_tokens))
