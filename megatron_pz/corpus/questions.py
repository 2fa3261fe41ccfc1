"""Questions with reference answers, for RL with verified rewards: JSONL or Parquet, in the form of WebInstruct-verified.

| field | |
|---|---|
| `question`, `answer` | texts; both are wanted |
| `id` | else it is `<file>:<row>` |
| `category` | becomes the title |
| `answer_type`, `difficulty` | not read |

A row without a question or an answer is an error, or left out and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_pz.errors import CorpusError, pip_install
from megatron_pz.types import Paragraph

ENDINGS = (".jsonl", ".parquet")


def read_questions(path: str | Path, *, skip_bad_lines: bool = False) -> tuple[list[Paragraph], dict[str, int]]:
    """All questions at `path`, each a `Paragraph` with its `answer`, and how many rows were read and left out.

    Args:
        path: a file, or a folder whose `*.jsonl` and `*.parquet` are read, those of its subfolders included.
        skip_bad_lines: leave out rows without question or answer instead of stopping at the first.

    Raises:
        CorpusError: nothing at `path`, or a row that cannot be used.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.suffix in ENDINGS)
    counts: Counter[str] = Counter()
    found: dict[str, Paragraph] = {}
    for file in files:
        for number, row in enumerate(_rows(file), start=1):
            place = f"{file}:{number}"
            question = row if isinstance(row, dict) else {}
            text, answer = question.get("question"), question.get("answer")
            name = str(question.get("id") or f"{file.stem}:{number}")
            usable = (
                isinstance(text, str) and text.strip() and isinstance(answer, str | int | float) and str(answer).strip()
            )
            if not usable or name in found:
                reason = "duplicate_id" if usable else "no_question_or_answer"
                if not skip_bad_lines:
                    raise CorpusError(
                        f"{place}: {reason.replace('_', ' ')} ({str(row)[:100]}); wanted `question` and `answer`, and an `id` "
                        "of its own if one is given. Mend the row, or leave such rows out with --skip-bad-lines."
                    )
                counts[reason] += 1
                continue
            found[name] = Paragraph(
                name, str(text).strip(), str(question.get("category") or ""), answer=str(answer).strip()
            )
    if not found:
        raise CorpusError(
            f"{root} holds no question: {len(files)} file(s) read. Give --data-path a JSONL or Parquet file with `question` "
            "and `answer`."
        )
    return list(found.values()), {"read": len(found), **counts}


def _rows(file: Path) -> Iterator[Any]:
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise CorpusError(
                f"{file} is Parquet, and the package pyarrow is not installed: {pip_install('megatron_pz[evaluate]')}"
            ) from error
        yield from parquet.read_table(file).to_pylist()
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    for line in lines:
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                yield line
