"""A corpus on disk that is mapped into memory, not read: any paragraph in O(1).

store.json           format, counts, tokenizer, attributions
text.bin             the paragraphs' UTF-8, one behind the other
ends.npy             uint64 [paragraphs + 1]: paragraph i is text.bin[ends[i]:ends[i + 1]]
tokens.npy           uint32 [paragraphs]: length in tokens of the store's tokenizer
document.npy         uint32 [paragraphs]: its document; number.npy: its number in the document, before any was left out
documents.bin        a JSON list [key, title, url, its attribution in store.json] a document; document_ends.npy cuts it as ends.npy does

An id is `<document's key>#<number>`: it stays when filters change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from megatron_pz.errors import CorpusError
from megatron_pz.types import Encoder, Paragraph

FORMAT = "megatron_pz corpus 1"
HEAD = "store.json"
CARD = "card.json"
"""Holds the hashes of all other files of the store and of its held-out part."""
COLUMNS = {
    "ends": np.uint64,
    "tokens": np.uint32,
    "document": np.uint32,
    "number": np.uint32,
    "document_ends": np.uint64,
}
_PROBE = (
    "The quick brown fox, 1234567890 times; naïve café — “quoted” (x² + y² = z²)\n\n  def f(x): return {x: [1.5e-3]}\t"
    "한국어 문장입니다. 中文句子，日本語の文。 Русский текст. ελληνικά हिन्दी العربية 🙂 antidisestablishmentarianism"
)


def is_store(path: str | Path) -> bool:
    """Whether `path` is the folder of a prepared corpus."""
    return (Path(path) / HEAD).is_file()


def tokenizer_digest(tokenizer: Encoder) -> str:
    """Equal for tokenizers that cut text alike, as far as a text of many scripts and their sizes tell."""
    said = [tokenizer.vocab_size, list(tokenizer.eos_token_ids), tokenizer.encode(_PROBE)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class CorpusStore(Sequence[Paragraph]):
    """The paragraphs at `rows` of a store, all where None.

    Raises:
        CorpusError: no store, or one of another format or size.
    """

    def __init__(self, folder: str | Path, rows: np.ndarray | None = None) -> None:
        self.folder, self.rows = Path(folder), rows
        try:
            self.head: dict[str, Any] = json.loads((self.folder / HEAD).read_text(encoding="utf-8"))
            columns = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
            texts = [np.memmap(self.folder / name, np.uint8, "r") for name in ("text.bin", "documents.bin")]
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"{folder} is no whole corpus store: {error}. Make it anew with tools/prepare_corpus.py."
            ) from error
        if self.head.get("format") != FORMAT or columns["ends"][-1] != len(texts[0]):
            raise CorpusError(
                f"{folder} is not of the format {FORMAT!r}, or cut off. Make it anew with tools/prepare_corpus.py."
            )
        self._ends, self.tokens = columns["ends"], columns["tokens"]
        self._document, self._number = columns["document"], columns["number"]
        self._document_ends, (self._text, self._documents) = columns["document_ends"], texts

    def __len__(self) -> int:
        return len(self.tokens) if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Paragraph: ...
    @overload
    def __getitem__(self, index: slice) -> list[Paragraph]: ...
    def __getitem__(self, index: int | slice) -> Paragraph | list[Paragraph]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self) if self.rows is None else int(self.rows[index])
        document = int(self._document[row])
        key, title, url, source = json.loads(_cut(self._documents, self._document_ends, document))
        source = self.head["attributions"][source]
        told = f"{source} ({url})" if url else source
        return Paragraph(f"{key}#{self._number[row]}", _cut(self._text, self._ends, row).decode("utf-8"), title, told)


class StoreWriter:
    """Writes a store's files into `folder`; `close` gives its head."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._text: IO[bytes] = (folder / "text.bin").open("wb")
        self._documents: IO[bytes] = (folder / "documents.bin").open("wb")
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self._columns["ends"].append(np.zeros(1, np.uint64))
        self._columns["document_ends"].append(np.zeros(1, np.uint64))
        self._last: str | None = None
        self._num_documents = 0

    def add(
        self, texts: Sequence[bytes], tokens: Sequence[int], heads: Sequence[bytes], numbers: Sequence[int]
    ) -> None:
        """Paragraphs in their order; `heads`: the JSON of each one's document, equal heads in a row being one document."""
        ends, document, document_ends = [], [], []
        for text, head in zip(texts, heads, strict=True):
            self._text.write(text)
            ends.append(self._text.tell())
            if head.decode() != self._last:
                self._last = head.decode()
                self._num_documents += 1
                self._documents.write(head)
                document_ends.append(self._documents.tell())
            document.append(self._num_documents - 1)
        new = {"ends": ends, "tokens": tokens, "document": document, "number": numbers, "document_ends": document_ends}
        for name, values in new.items():
            self._columns[name].append(np.array(values, COLUMNS[name]))

    def close(self, head: dict[str, Any]) -> dict[str, Any]:
        self._text.close()
        self._documents.close()
        for name, pieces in self._columns.items():
            np.save(self.folder / f"{name}.npy", np.concatenate([np.empty(0, COLUMNS[name]), *pieces]))
        tokens = np.load(self.folder / "tokens.npy")
        whole = {
            "format": FORMAT,
            "paragraphs": len(tokens),
            "documents": self._num_documents,
            "tokens": int(tokens.sum(dtype=np.uint64)),
            "text_bytes": (self.folder / "text.bin").stat().st_size,
            **head,
        }
        (self.folder / HEAD).write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return whole


def _cut(data: np.ndarray, ends: np.ndarray, place: int) -> bytes:
    return data[int(ends[place]) : int(ends[place + 1])].tobytes()
