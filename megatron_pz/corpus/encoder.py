"""Encoders for many processes: ids and end tokens without `transformers`, which takes 200 MiB and seconds in each.

A tokenizer whose class leaves encoding to the library `tokenizers` is read once by `transformers`, in a process that ends, and
goes to the workers as that library's own JSON. It is not read from tokenizer.json: classes rebuild and extend what stands there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from megatron_pz.corpus.tokenizer import HFTokenizer, load_tokenizer
from megatron_pz.corpus.workers import elsewhere
from megatron_pz.types import Encoder

_TEXT = "The quick brown fox, 1234567890 times; na\u00efve caf\u00e9\n\n  def f(x): return {x: [1.5e-3]}\t한국어 中文句子 🙂"


class PlainEncoder:
    """A tokenizer of `tokenizers` out of its JSON.

    Args:
        splits_special: text that spells a special token is cut like any other.
    """

    def __init__(self, text: str, splits_special: bool, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = splits_special  # no part of the JSON
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size, self.eos_token_ids = vocab_size, eos_token_ids

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def encoder_maker(path: str) -> Callable[[], Encoder]:
    """What makes the encoder of the tokenizer at `path`, in any process; its ids are those of `load_tokenizer`.

    Raises:
        TokenizerError: as `load_tokenizer`.
    """
    is_here = "transformers" in sys.modules  # then nothing is saved by reading it elsewhere
    plain = _plain(path) if is_here else elsewhere(_plain, path)
    return functools.partial(load_tokenizer, path) if plain is None else functools.partial(PlainEncoder, *plain)


def _plain(path: str) -> tuple[str, bool, int, tuple[int, ...]] | None:
    """Arguments of `PlainEncoder`; None where the tokenizer is not of `tokenizers`, or encodes otherwise."""
    found = load_tokenizer(path)
    backend: Any = found.backend() if isinstance(found, HFTokenizer) else None
    if backend is None:
        return None
    given = (backend.to_str(), bool(backend.encode_special_tokens), found.vocab_size, found.eos_token_ids)
    specials = [token.content for token in backend.get_added_tokens_decoder().values()]
    probes = (_TEXT, "", " ", *(f"{piece}{token}{piece}" for token in specials for piece in ("", "a ")))
    encoder = PlainEncoder(*given)
    return given if all(encoder.encode(text) == found.encode(text) for text in probes) else None
