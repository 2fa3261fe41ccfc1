"""Documents out of dumps, Parquet, JSONL (`.gz` too), plain text, and folders of these.

A document is plain data that a worker process can be sent; its `key` is stable while the source stays as it is.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_pz.corpus.dump import DumpBroken, raw_pages, site
from megatron_pz.errors import CorpusError

KINDS = (".bz2", ".xml", ".parquet", ".jsonl", ".jsonl.gz", ".txt", ".md")
ATTRIBUTION = "ATTRIBUTION.txt"
"""Tells of the files beside it; it is no text of the corpus."""
WIKIPEDIA = "Wikipedia contributors, CC BY-SA 4.0"


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one page of a dump that is still XML (`raw`; then `key` is the wiki's name and `url` its address)."""

    key: str
    title: str
    url: str
    text: str
    raw: bytes = b""
    language: str = ""
    dropped_links: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.raw) + len(self.text)


def source_files(sources: list[Path]) -> list[tuple[str, Path]]:
    """(name, file) of every file of `sources`, folders walked in order of their paths.

    Raises:
        CorpusError: nothing there, or nothing that can be read.
    """
    found: list[tuple[str, Path]] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(
                file
                for file in source.rglob("*")
                if file.is_file() and file.name.endswith(KINDS) and file.name != ATTRIBUTION
            )
            found += [(file.relative_to(source).as_posix(), file) for file in inside]
        elif source.is_file() and source.name.endswith(KINDS):
            found.append((source.name, source))
        else:
            raise CorpusError(
                f"{source} is no source: found {'another kind of file' if source.exists() else 'nothing'}; wanted a folder "
                f"or a file that ends in {', '.join(KINDS)}."
            )
    if not found:
        raise CorpusError(
            f"{', '.join(map(str, sources))}: no file that ends in {', '.join(KINDS)}. Name another folder."
        )
    return found


def documents(name: str, file: Path) -> Iterator[Document]:
    """Every document of a file.

    Raises:
        DumpBroken: the file is damaged; what stood before has come out.
        CorpusError: a line or a column is not as wanted.
    """
    if name.endswith((".xml", ".bz2")):
        yield from _pages(file)
    elif name.endswith(".parquet"):
        yield from _rows(name, file)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        yield from _lines(name, file)
    else:
        yield Document(name, Path(name).stem, "", file.read_text(encoding="utf-8", errors="replace"))


def attribution(name: str, file: Path) -> str:
    """What has to be said of a file's text: ATTRIBUTION.txt beside it, or what its format tells; else that it is unknown."""
    beside = file.parent / ATTRIBUTION
    if beside.is_file():
        return beside.read_text(encoding="utf-8").strip()
    if name.endswith((".xml", ".bz2")):
        return WIKIPEDIA
    if name.endswith(".parquet"):
        with contextlib.suppress(DumpBroken):  # it has been told where the rows were read
            if (first := next(_rows(name, file), None)) and "wikipedia.org/" in first.url:
                return WIKIPEDIA
    return "origin and licence not stated"


def _pages(file: Path) -> Iterator[Document]:
    pages = raw_pages(file)
    head = next(pages, b"")
    key, base, language, names = site(head)
    for raw in pages:
        yield Document(key, "", base, "", raw, language, names)


def _rows(name: str, file: Path) -> Iterator[Document]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise CorpusError(f"{file} has the columns {table.schema_arrow.names}; wanted one that is called `text`.")
        wanted = [column for column in ("id", "url", "title", "text") if column in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            for row in batch.to_pylist():
                key = str(row.get("url") or row.get("id") or f"{name}:{number}")
                yield Document(key, row.get("title") or "", row.get("url") or "", row["text"] or "")
                number += 1
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise DumpBroken(f"{file} is no whole Parquet file: {error}") from error


def _lines(name: str, file: Path) -> Iterator[Document]:
    opened = gzip.open(file, "rb") if name.endswith(".gz") else file.open("rb")
    with opened as stream:
        number = 0
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                    raise DumpBroken(
                        f"{file}:{number} has no string field `text`; what stands before is kept. Mend the line."
                    )
                key = str(record.get("id") or f"{name}:{number}")
                text = record["text"].encode("utf-8", "replace").decode("utf-8")
                yield Document(key, str(record.get("title") or ""), str(record.get("url") or ""), text)
        except (ValueError, EOFError, OSError) as error:
            raise DumpBroken(
                f"{file}:{number + 1} or the line before is no JSON: {error}; what stands before is kept."
            ) from error
