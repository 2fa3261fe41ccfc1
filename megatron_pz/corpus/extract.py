"""One batch of documents to paragraphs with their keys, lengths and fates: what a worker process does."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from megatron_pz.corpus.dump import parse_page
from megatron_pz.corpus.ngrams import forbidden_grams, shares_gram, text_keys
from megatron_pz.corpus.paragraphs import reject_reason
from megatron_pz.corpus.quality import quality_reason
from megatron_pz.corpus.sources import Document, documents, source_files
from megatron_pz.corpus.wikitext import wiki_paragraphs
from megatron_pz.types import Encoder


@dataclass(frozen=True)
class PrepareSettings:
    """How a corpus is made. Everything but the sources that its content depends on."""

    tokenizer: str
    min_tokens: int = 32
    max_tokens: int = 1280
    language: str = ""  # of the filters; empty: a dump's own, none for other sources
    held_out: float = 0.01  # share of documents
    seed: int = 1234
    evaluation: tuple[str, ...] = ()  # files whose n-grams must not occur
    ngram: int = 13

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"evaluation": list(self.evaluation)}


class Extractor:
    """Holds what is loaded once a process: tokenizer and forbidden n-grams.

    Args:
        make_encoder: of `settings.tokenizer` (`encoder.encoder_maker`).
    """

    def __init__(self, settings: PrepareSettings, make_encoder: Callable[[], Encoder]) -> None:
        self.settings = settings
        self.tokenizer = make_encoder()
        self.forbidden, self.num_short = evaluation_grams(settings.evaluation, settings.ngram)

    def __call__(self, batch: Sequence[tuple[int, Document]]) -> dict[str, np.ndarray]:
        """Columns of the paragraphs that are kept so far, and `counts` as JSON.

        Args:
            batch: (number of the source, document).
        """
        counts: Counter[str] = Counter()
        rows: list[tuple[bytes, int, int, bytes, int, int, int, int]] = []
        for source, document in batch:
            key, title, url, language, paragraphs = self._read(document, counts)
            if not paragraphs:
                continue
            head = json.dumps([key, title, url, source], ensure_ascii=False).encode("utf-8", "replace")
            held = _share(self.settings.seed, key) < self.settings.held_out
            name = int.from_bytes(blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "little")
            for number, text in enumerate(paragraphs):
                counts["paragraphs"] += 1
                reason, length = self._judge(text, self.settings.language or language)
                if reason is not None:
                    counts[reason] += 1
                    continue
                exact, near = text_keys(text)
                rows.append((text.encode("utf-8"), length, number, head, held, name, exact, near))
        return _columns(rows, counts)

    def _read(self, document: Document, counts: Counter[str]) -> tuple[str, str, str, str, list[str]]:
        counts["documents"] += 1
        if not document.raw:
            return document.key, document.title, document.url, "", text_paragraphs(document.text)
        page, title, space, is_redirect, text = parse_page(document.raw)
        if space != "0" or is_redirect:
            counts["page_other_namespace" if space != "0" else "page_redirect"] += 1
            return "", "", "", "", []
        url = f"{document.url}/wiki/{title.replace(' ', '_')}"
        paragraphs = wiki_paragraphs(text, document.dropped_links)
        return f"{document.key}:{page}", title, url, document.language, paragraphs

    def _judge(self, text: str, language: str) -> tuple[str | None, int]:
        if (fault := quality_reason(text, language)) is not None:
            return fault, 0
        ids = self.tokenizer.encode(text)
        reason = reject_reason(text, ids, self.tokenizer, self.settings.min_tokens, self.settings.max_tokens)
        if reason is None and shares_gram(text, self.forbidden, self.settings.ngram):
            reason = "contaminated"
        return reason, len(ids)


def text_paragraphs(text: str) -> list[str]:
    """Paragraphs of plain text: what stands between blank lines, lines joined."""
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip()]


def evaluation_grams(files: Sequence[str], n: int) -> tuple[np.ndarray, int]:
    """N-grams of every string in evaluation files, sorted uint64 [grams], and how many texts are too short to have one."""
    return _grams(tuple(files), n)


@lru_cache(maxsize=1)
def _grams(files: tuple[str, ...], n: int) -> tuple[np.ndarray, int]:
    from pathlib import Path

    texts: list[str] = []
    for name, file in source_files([Path(given) for given in files]) if files else []:
        if name.endswith(".jsonl"):
            lines = file.read_text(encoding="utf-8").splitlines()
            texts += [text for line in lines if line.strip() for text in _strings(json.loads(line))]
        elif name.endswith(".parquet"):
            import pyarrow.parquet

            texts += [text for row in pyarrow.parquet.read_table(file).to_pylist() for text in _strings(row)]
        else:
            texts += [document.text for document in documents(name, file)]
    return forbidden_grams(texts, n)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in _strings(part)]


def _share(seed: int, key: str) -> float:
    digest = blake2b(f"{seed}/{key}/held_out".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _columns(
    rows: Sequence[tuple[bytes, int, int, bytes, int, int, int, int]], counts: Counter[str]
) -> dict[str, np.ndarray]:
    texts, tokens, numbers, heads, held, names, exact, near = zip(*rows, strict=True) if rows else ((),) * 8
    return {
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "sizes": np.array([len(text) for text in texts], np.uint32),
        "heads": np.frombuffer(b"".join(heads), np.uint8),
        "head_sizes": np.array([len(head) for head in heads], np.uint32),
        "tokens": np.array(tokens, np.uint32),
        "number": np.array(numbers, np.uint32),
        "held": np.array(held, bool),
        "name": np.array(names, np.uint64),
        "exact": np.array(exact, np.uint64),
        "near": np.array(near, np.uint64),
        "counts": np.frombuffer(json.dumps(counts).encode(), np.uint8),
    }
