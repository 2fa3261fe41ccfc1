"""From sources to a corpus store with its card, over several cores; goes on where a killed run stopped.

1. Sources are cut into batches of documents, the same in every run. Each batch's paragraphs are written whole to
   `.tmp-OUT/batches` and never made twice.
2. Texts that occurred before are found when all batches are there, in the order of the sources: neither the number of
   workers nor a break changes a byte of the result.
3. Memory: the batches in flight, and about 70 bytes a paragraph at the end.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pz.corpus.dump import DumpBroken
from megatron_pz.corpus.encoder import encoder_maker
from megatron_pz.corpus.extract import Extractor, PrepareSettings
from megatron_pz.corpus.ngrams import is_first
from megatron_pz.corpus.sources import Document, attribution, documents, source_files
from megatron_pz.corpus.store import StoreWriter, tokenizer_digest
from megatron_pz.corpus.workers import in_order
from megatron_pz.errors import CorpusError, DiskError

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 2000
MERGE_REASONS = ("repeated_id", "duplicate", "near_duplicate")
"""Same document and number again; same text but for case, punctuation and space; the same but for digits as well."""


def prepare(
    sources: Sequence[Path],
    out: Path,
    settings: PrepareSettings,
    *,
    num_workers: int = 1,
    licence: str = "",
    tell: Callable[[int, int], None] = lambda batches, size: None,
) -> dict[str, Any]:
    """The card of the store that is now at `out`; its held-out part is the store `out/held_out`.

    Args:
        licence: what is said of the text's origin, where the sources do not tell.
        tell: called after each batch with how many are done and their bytes of text or XML.

    Raises:
        CorpusError: a source cannot be used, or nothing is left of all of them.
        DiskError: `out` exists, or cannot be written.
    """
    if out.exists():
        raise DiskError(f"{out} exists already. Remove it, or choose another name for the output.")
    files = source_files(list(sources))
    make_encoder = encoder_maker(settings.tokenizer)
    extractor = Extractor(settings, make_encoder)  # a bad tokenizer or evaluation file is told before anything is read
    folder = _begin(out, files, settings)
    broken: list[str] = []
    total = 0
    make = functools.partial(Extractor, settings, make_encoder) if num_workers > 1 else lambda: extractor
    try:
        wanted = list_missing(files, folder, broken)
        for number, (place, size, columns) in enumerate(
            in_order(functools.partial(_Job, make), wanted, num_workers), 1
        ):
            if columns is not None:
                part = place.with_suffix(".part")
                with part.open("wb") as file:
                    np.savez(file, **columns)
                part.replace(place)
            total += size
            tell(number, total)
        return _merge(out, folder, files, settings, extractor, broken, licence)
    except OSError as error:
        raise DiskError(
            f"{folder} cannot be written: {error.strerror}. Make room; the same command goes on."
        ) from error


class _Job:
    """(path, bytes, columns) of a batch; no columns where its file is there already."""

    def __init__(self, make: Callable[[], Extractor]) -> None:
        self._extract = make()

    def __call__(self, work: tuple[Path, int, list[tuple[int, Document]]]) -> tuple[Path, int, Any]:
        place, size, batch = work
        return place, size, self._extract(batch) if batch else None


def list_missing(
    files: Sequence[tuple[str, Path]], folder: Path, broken: list[str]
) -> Iterator[tuple[Path, int, list[tuple[int, Document]]]]:
    """Every batch with its path; without its documents where it is done. Breaks of sources are put into `broken`."""
    batch: list[tuple[int, Document]] = []
    number = size = 0

    def cut() -> tuple[Path, int, list[tuple[int, Document]]]:
        place = folder / "batches" / f"{number:07d}.npz"
        return place, size, [] if place.is_file() else batch

    for source, (name, file) in enumerate(files):
        try:
            for document in documents(name, file):
                batch.append((source, document))
                size += document.size
                if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                    yield cut()
                    batch, number, size = [], number + 1, 0
        except DumpBroken as error:
            broken.append(str(error))
    if batch:
        yield cut()


def _begin(out: Path, files: Sequence[tuple[str, Path]], settings: PrepareSettings) -> Path:
    """The folder of an unfinished run; emptied where it was of other sources or settings."""
    folder = out.with_name(f".tmp-{out.name}")
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for _, path in files]
    task = json.dumps({"sources": stats, "settings": settings.as_json()}, sort_keys=True)
    told = folder / "task.json"
    try:
        if not told.is_file() or told.read_text(encoding="utf-8") != task:
            shutil.rmtree(folder, ignore_errors=True)
        (folder / "batches").mkdir(parents=True, exist_ok=True)
        told.write_text(task, encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{folder} cannot be written: {error.strerror}.") from error
    return folder


def _merge(
    out: Path,
    folder: Path,
    files: Sequence[tuple[str, Path]],
    settings: PrepareSettings,
    extractor: Extractor,
    broken: list[str],
    licence: str,
) -> dict[str, Any]:
    batches = sorted((folder / "batches").glob("*.npz"))
    counts: Counter[str] = Counter()
    keys: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.uint64)] for name in ("id", "exact", "near")}
    for path in batches:
        with np.load(path) as columns:
            counts.update(json.loads(columns["counts"].tobytes()))
            keys["id"].append(columns["name"] * np.uint64(0x9E3779B97F4A7C15) + columns["number"])
            keys["exact"].append(columns["exact"])
            keys["near"].append(columns["near"])
    kept = np.ones(sum(map(len, keys["id"])), bool)
    for reason, name in zip(MERGE_REASONS, keys, strict=True):
        stays = kept.copy()
        stays[kept] = is_first(np.concatenate(keys[name])[kept])
        if left := int(kept.sum() - stays.sum()):
            counts[reason] = left
        kept = stays
    if not kept.any():
        raise CorpusError(
            f"Nothing is left of the sources: {dict(counts)}. Widen --min-tokens and --max-tokens, or see the reasons."
        )
    made = folder / "store"
    shutil.rmtree(made, ignore_errors=True)
    writers = {False: StoreWriter(made), True: StoreWriter(made / "held_out")}
    done = 0
    for path in batches:
        with np.load(path) as columns:
            here = kept[done : done + len(columns["tokens"])]
            done += len(here)
            for held, writer in writers.items():
                _copy(columns, here & (columns["held"] == held), writer)
    sources = [{"name": name, "sha256": _sha256(file), "bytes": file.stat().st_size} for name, file in files]
    said = [told if (told := attribution(name, file)) and not licence else licence for name, file in files]
    shared = {
        "tokenizer": settings.tokenizer,
        "tokenizer_digest": tokenizer_digest(extractor.tokenizer),
        "min_tokens": settings.min_tokens,
        "max_tokens": settings.max_tokens,
        "attributions": said,
    }
    heads = {held: writer.close(shared) for held, writer in writers.items()}
    credit = "\n".join([*dict.fromkeys(said), "Cleaned and cut into paragraphs by megatron_pz."]) + "\n"
    for place in (made, made / "held_out"):
        (place / "ATTRIBUTION.txt").write_text(credit, encoding="utf-8")
    card = {
        "counts": dict(sorted(counts.items())),
        "train": {name: heads[False][name] for name in ("paragraphs", "documents", "tokens", "text_bytes")},
        "held_out": {name: heads[True][name] for name in ("paragraphs", "documents", "tokens", "text_bytes")},
        "broken": broken,
        "attribution": list(dict.fromkeys(said)),
        "sources": sources,
        "settings": settings.as_json(),
        "evaluation_files": [{"name": name, "sha256": _sha256(file)} for name, file in _evaluation(settings)],
        "evaluation_texts_too_short": extractor.num_short,
        "output_sha256": {
            path.relative_to(made).as_posix(): _sha256(path) for path in sorted(made.rglob("*")) if path.is_file()
        },
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "mwparserfromhell", "tokenizers")},
    }
    (made / "card.json").write_text(json.dumps(card, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (made / "CARD.md").write_text(card_text(out.name, card), encoding="utf-8")
    os.rename(made, out)
    shutil.rmtree(folder)
    return card


def card_text(name: str, card: dict[str, Any]) -> str:
    """The card as Markdown."""
    lines = [
        f"# Corpus {name}",
        "",
        *card["attribution"],
        "",
        "| part | paragraphs | documents | tokens |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {part} | {card[part]['paragraphs']} | {card[part]['documents']} | {card[part]['tokens']} |"
        for part in ("train", "held_out")
    ]
    lines += [
        "",
        "| count | |",
        "|---|---|",
        *(f"| {reason} | {number} |" for reason, number in card["counts"].items()),
    ]
    lines += ["", *(f"- **Broken:** {line}" for line in card["broken"])]
    lines += [f"- source {file['name']}: {file['bytes']} bytes, sha256 {file['sha256']}" for file in card["sources"]]
    lines += [f"- {setting}: {value}" for setting, value in card["settings"].items()]
    lines += [f"- {package} {version}" for package, version in card["versions"].items()]
    return "\n".join(lines) + "\n"


def _copy(columns: Any, here: np.ndarray, writer: StoreWriter) -> None:
    places = np.flatnonzero(here)
    if not len(places):
        return
    pieces = {}
    for name, sizes in (("text", "sizes"), ("heads", "head_sizes")):
        data, ends = columns[name].tobytes(), np.concatenate([[0], np.cumsum(columns[sizes], dtype=np.int64)])
        pieces[name] = [data[ends[place] : ends[place + 1]] for place in places]
    writer.add(pieces["text"], columns["tokens"][here], pieces["heads"], columns["number"][here])


def _evaluation(settings: PrepareSettings) -> list[tuple[str, Path]]:
    return source_files([Path(file) for file in settings.evaluation]) if settings.evaluation else []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
