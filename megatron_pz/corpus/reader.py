"""Paragraphs out of JSONL: a file, or a folder of them.

One object a line with a string `text`; `id`, `title` and `source` may stand beside it. Other fields are ignored.

1. Order is that of the files' relative paths, then of the lines.
2. An `id` that is not given is `<file without .jsonl>:<line>`: it does not change while the line stays where it is.
3. Every line ends as a paragraph, a blank, or a counted reason; nothing disappears without a number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_pz.errors import CorpusError
from megatron_pz.types import Paragraph


class _BadLine(Exception):
    def __init__(self, reason: str, found: str) -> None:
        super().__init__(found)
        self.reason, self.found = reason, found


def read_paragraphs(path: str | Path, *, skip_bad_lines: bool = False) -> tuple[list[Paragraph], dict[str, int]]:
    """All paragraphs at `path`, and how many lines were read and left out, by reason.

    Args:
        path: a JSONL file, or a folder whose `*.jsonl` files are read, those of its subfolders included.
        skip_bad_lines: leave out malformed lines (counted) instead of stopping at the first.

    Raises:
        CorpusError: nothing at `path`; a malformed line (named by file and line); no paragraph at all.
    """
    root = Path(path)
    counts: Counter[str] = Counter()
    paragraphs: list[Paragraph] = []
    places: dict[str, str] = {}  # id -> where it was first seen
    files = _files(root)
    for file in files:
        name = file.relative_to(root).with_suffix("").as_posix() if root.is_dir() else file.stem
        for number, line in _lines(file):
            place = f"{file}:{number}"
            try:
                paragraph = _parse(line, default_id=f"{name}:{number}")
                if paragraph.id in places:
                    raise _BadLine("duplicate_id", f"the id {paragraph.id!r}, already used at {places[paragraph.id]}")
            except _BadLine as bad:
                if not skip_bad_lines:
                    raise CorpusError(
                        f"{place}: found {bad.found}; wanted one JSON object with a string field `text` and, if "
                        "`id` is given, an id of its own. Mend the line, or leave such lines out with --skip-bad-lines."
                    ) from bad
                counts[bad.reason] += 1
                continue
            places[paragraph.id] = place
            paragraphs.append(paragraph)
    if not paragraphs:
        left_out = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())) or "none"
        raise CorpusError(
            f"{root} holds no paragraph: {len(files)} file(s) read, lines left out: {left_out}. "
            'Give --data-path a JSONL file with lines like {"text": "..."}.'
        )
    return paragraphs, {"read": len(paragraphs), **counts}


def _files(root: Path) -> list[Path]:
    if root.is_dir():
        files = sorted(path for path in root.rglob("*.jsonl") if path.is_file())
        if not files:
            raise CorpusError(f"The folder {root} holds no *.jsonl file. Put the text there, one JSON object a line.")
        return files
    if not root.is_file():
        raise CorpusError(
            f"There is no file or folder {root}. Name a JSONL file or a folder of them (--data-path, --held-out-path)."
        )
    return [root]


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except OSError as error:
        raise CorpusError(f"{file} cannot be read: {error.strerror}. Check the path and its permissions.") from error


def _parse(line: bytes, default_id: str) -> Paragraph:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLine("not_utf8", f"a line that is not UTF-8 (byte {error.start + 1})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise _BadLine("not_json", f"a line that is not JSON ({what}): {_shown(line)}") from error
    if not isinstance(record, dict):
        raise _BadLine("not_an_object", f"a JSON {type(record).__name__} in place of an object: {_shown(line)}")
    if not isinstance(record.get("text"), str):
        kind = type(record["text"]).__name__ if "text" in record else None
        raise _BadLine("no_text", f"`text` of type {kind}" if kind else f"no `text` among the fields {list(record)}")
    fields = {name: _string(record, name) for name in ("text", "id", "title", "source")}
    return Paragraph(fields["id"] or default_id, fields["text"], fields["title"], fields["source"])


def _string(record: dict[str, object], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadLine("bad_field", f"`{name}` of type {type(value).__name__}, where a string belongs")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # A JSON escape can spell half of a surrogate pair, which is no character: no tokenizer takes it.
        raise _BadLine("bad_field", f"`{name}` with half a surrogate pair at character {error.start + 1}") from error
    return text


def _shown(line: bytes, most: int = 60) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= most else text[:most] + "...")
