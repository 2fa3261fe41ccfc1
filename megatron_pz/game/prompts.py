r"""The two prompts, from text files that anyone can edit.

A folder holds `mask.txt` with the placeholder `{paragraph}` and `prediction.txt` with `{masked_paragraph}`. All else in
them is literal, braces included; one newline at the end of the file is the editor's and left out.

`prediction.txt` may also say `{text_before_mask}`: the text up to the first `[mask]`, without the spaces at its end. Put last,
it lets a small language model answer by doing what it was trained for, going on with a text, after it has read the rest.

A plain template may end inside an opened `\mask{` or `\boxed{`, so that the policy only has to go on. The response is
then read as if the opening stood before it (`Template.answer_prefix`), and ends where the brace is closed
(`Templates.stop_token_ids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from megatron_pz.errors import TemplateError
from megatron_pz.game.masking import MASK_TOKEN
from megatron_pz.types import Role, Tokenizer

PromptStyle = Literal["plain", "chat"]
OWN_TEMPLATES = Path(__file__).parent / "templates"
PLACEHOLDERS = {Role.GENERATOR: "{paragraph}", Role.PREDICTOR: "{masked_paragraph}"}
TEXT_BEFORE_MASK = "{text_before_mask}"
COMMANDS = {Role.GENERATOR: "mask", Role.PREDICTOR: "boxed"}


@dataclass(frozen=True)
class Template:
    """The prompt of one role, with a placeholder for the text it is about."""

    role: Role
    text: str
    file: str  # for messages

    def __post_init__(self) -> None:
        wanted, others = PLACEHOLDERS[self.role], [p for role, p in PLACEHOLDERS.items() if role is not self.role]
        if wanted not in self.text:
            swapped = [other for other in others if other in self.text]
            found = f"{swapped[0]}, which belongs into the other file" if swapped else "none in its place"
            raise TemplateError(
                f"The template {self.file} lacks its placeholder {wanted} (found {found}). "
                f"Put {wanted} where the text is to stand."
            )

    def fill(self, text: str) -> str:
        """The prompt about `text`."""
        parts = self.text.split(PLACEHOLDERS[self.role])
        if self.role is Role.PREDICTOR:
            before = text.partition(MASK_TOKEN)[0].rstrip()
            parts = [part.replace(TEXT_BEFORE_MASK, before) for part in parts]  # not in `text`, which is literal
        return text.join(parts)

    @cached_property
    def answer_prefix(self) -> str:
        r"""What the template's end has already written of the answer, from an opened `\mask{` on; mostly nothing."""
        opening = f"\\{COMMANDS[self.role]}{{"
        start = self.text.rfind(opening)
        tail = self.text[start:] if start >= 0 else ""
        asks = any(place in tail for place in (PLACEHOLDERS[self.role], TEXT_BEFORE_MASK))
        is_open = not asks and tail.count("{") > tail.count("}")
        return tail if is_open else ""


@dataclass(frozen=True)
class Templates:
    """The prompts of both roles, and how they are framed."""

    mask: Template
    prediction: Template
    style: PromptStyle

    @classmethod
    def load(cls, template_dir: str | Path = "", style: PromptStyle = "chat") -> Templates:
        """Templates of the folder `template_dir`; empty: the package's own for `style`.

        Raises:
            TemplateError: a file is missing, lacks its placeholder, or (chat) ends inside an opened answer.
        """
        folder = Path(template_dir) if str(template_dir) else OWN_TEMPLATES / style
        mask = Template(Role.GENERATOR, _read(folder / "mask.txt"), str(folder / "mask.txt"))
        prediction = Template(Role.PREDICTOR, _read(folder / "prediction.txt"), str(folder / "prediction.txt"))
        for template in (mask, prediction):
            if style == "chat" and template.answer_prefix:
                raise TemplateError(
                    f"The template {template.file} ends inside {template.answer_prefix!r}, which a chat turn closes "
                    "off from the answer. Close the brace, or use --prompt-style plain."
                )
        return cls(mask, prediction, style)

    def of(self, role: Role) -> Template:
        return self.mask if role is Role.GENERATOR else self.prediction

    def mask_prompt(self, text: str) -> str:
        """Text that asks for a span of the paragraph `text`."""
        return self.mask.fill(text)

    def prediction_prompt(self, masked_text: str) -> str:
        """Text that asks for the words hidden in `masked_text`."""
        return self.prediction.fill(masked_text)

    def ids(self, prompt: str, tokenizer: Tokenizer) -> list[int]:
        """Token ids of a prompt: one user turn (`chat`), or the whole input of the policy (`plain`)."""
        if self.style == "chat":
            return tokenizer.apply_chat(prompt)
        return [*tokenizer.bos_token_ids, *tokenizer.encode(prompt)]

    def stop_token_ids(self, role: Role, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that end a response: the end tokens and, where the prompt opens the answer, those that close it."""
        closing = closing_token_ids(tokenizer) if self.of(role).answer_prefix else ()
        return tuple(dict.fromkeys((*tokenizer.eos_token_ids, *closing)))


def closing_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids whose text closes more braces than it opens. Reads the whole vocabulary once: a second or so."""
    texts = ((i, tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
    return tuple(i for i, text in texts if text.count("}") > text.count("{"))


def prompt_text(templates: Templates, prompt: str, ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """What a record shows as the prompt: the text that was tokenised, with a chat's frame where there is one."""
    return tokenizer.decode(ids) if templates.style == "chat" else prompt


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except FileNotFoundError as error:
        raise TemplateError(
            f"There is no template {file}. A template folder holds mask.txt and prediction.txt; "
            "leave --template-dir empty for the package's own."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"The template {file} cannot be read as UTF-8 text: {error}. Write it anew.") from error
