"""The prompt of a question, from text files: `<suite>.txt` of a folder, else `<kind>.txt` of it, else the package's own."""

from __future__ import annotations

from pathlib import Path

from megatron_pz.errors import TemplateError
from megatron_pz.evaluate.suites.formats import Question
from megatron_pz.evaluate.suites.table import Suite
from megatron_pz.grade.choices import LETTERS

OWN_PROMPTS = Path(__file__).parent / "prompts"


def load_prompt(suite: Suite, folder: Path | None = None) -> str:
    """The template of a suite.

    Raises:
        TemplateError: it cannot be read, or lacks a placeholder.
    """
    candidates = [folder / f"{suite.name}.txt", folder / f"{suite.kind}.txt"] if folder else []
    file = next((path for path in candidates if path.is_file()), OWN_PROMPTS / f"{suite.kind}.txt")
    try:
        text = file.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"The template {file} cannot be read as UTF-8 text: {error}.") from error
    for wanted in ("{question}", "{options}") if suite.kind == "choice" else ("{question}",):
        if wanted not in text:
            raise TemplateError(f"The template {file} lacks its placeholder {wanted}. Put it where that is to stand.")
    return text


def fill(template: str, question: Question) -> str:
    """The prompt about `question`; options are `(A): ...`, one a line."""
    options = "\n".join(f"({letter}): {option}" for letter, option in zip(LETTERS, question.options, strict=False))
    # In one pass: a question may itself contain the text of a placeholder.
    parts = template.split("{question}")
    return question.text.join(part.replace("{options}", options) for part in parts)
