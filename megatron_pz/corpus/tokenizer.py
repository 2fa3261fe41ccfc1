"""A tokenizer as the game needs it, from a Hugging Face folder or name, or from a SentencePiece `.model` file.

1. `encode` adds no special token; `bos_token_ids` is what the tokenizer itself would put in front of a text.
2. `eos_token_ids` is every id that ends a response: the tokenizer's own end first, then those of
   `generation_config.json`, then the end of a chat turn.
3. `decode` leaves out end tokens only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_pz.errors import TokenizerError
from megatron_pz.types import Tokenizer

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>")
"""What chat templates in use write at the end of a turn. A base model's own files often leave it out."""


class HFTokenizer:
    """A tokenizer of `transformers`."""

    def __init__(self, tokenizer: Any, name: str, more_eos_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self.name = tokenizer, name
        vocab: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if not self.vocab_size:
            raise TokenizerError(f"The tokenizer {name} has no tokens. Point --tokenizer at a complete folder.")
        ends = [tokenizer.eos_token_id, *more_eos_ids, *(vocab.get(token) for token in END_OF_TURN)]
        self.eos_token_ids = tuple(dict.fromkeys(int(end) for end in ends if end is not None))
        if not self.eos_token_ids:
            raise TokenizerError(
                f"The tokenizer {name} has no end token: none in its own files, in generation_config.json or among "
                f"{', '.join(END_OF_TURN)}. Set `eos_token` in its tokenizer_config.json."
            )
        self._ends = frozenset(self.eos_token_ids)
        self._decode = _decoder(tokenizer)
        self.bos_token_ids = self._put_in_front()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        kept = [*map(int, ids)]
        if kept and kept[-1] in self._ends:
            kept.pop()
        if not self._ends.isdisjoint(kept):  # a response ends with the first
            kept = [i for i in kept if i not in self._ends]
        return self._decode(kept)

    def apply_chat(self, user: str) -> list[int]:
        """Ids of one user turn, ready for the answer.

        Raises:
            TokenizerError: the tokenizer has no chat template.
        """
        if not self.has_chat_template:
            raise _no_chat_template(self.name)
        turn = [{"role": "user", "content": user}]
        ids = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids)

    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` that encodes; None where the class has a way of its own."""
        return self._tokenizer.backend_tokenizer if _leaves(self._tokenizer, ("encode", "_encode_plus")) else None

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat` can be called."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def after_answer(self) -> list[int]:
        """Ids that the chat template writes after an assistant's answer: first what ends the turn. Nothing: it writes none."""
        answer = "answer-7391"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        return self.encode(self._tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2].strip())

    def _put_in_front(self) -> tuple[int, ...]:
        alone = self.encode("a")
        framed = list(self._tokenizer.encode("a", add_special_tokens=True))
        return tuple(framed[: max(0, framed.index(alone[0]))]) if alone and alone[0] in framed else ()


class SentencePieceTokenizer:
    """A SentencePiece model."""

    def __init__(self, processor: Any, name: str) -> None:
        self._processor, self.name = processor, name
        self.vocab_size = int(processor.get_piece_size())
        end, begin = int(processor.eos_id()), int(processor.bos_id())
        if end < 0:
            raise TokenizerError(
                f"The SentencePiece model {name} was made without an end token (eos_id -1). Give it one."
            )
        turns = [int(processor.piece_to_id(piece)) for piece in END_OF_TURN]
        known = [i for i in turns if i not in (int(processor.unk_id()), end)]
        self.eos_token_ids: tuple[int, ...] = (end, *dict.fromkeys(known))
        self.bos_token_ids: tuple[int, ...] = (begin,) if begin >= 0 else ()

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self._processor.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids if i not in self.eos_token_ids]))

    def apply_chat(self, user: str) -> list[int]:
        """Raises TokenizerError: a SentencePiece model has no chat template."""
        raise _no_chat_template(self.name)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a Hugging Face folder or hub name, or a SentencePiece `.model` file (or its folder).

    Raises:
        TokenizerError: nothing there, nothing readable, or no end token.
    """
    place = Path(path)
    if place.suffix == ".model" or (place.is_dir() and _only_sentencepiece(place)):
        file = place if place.suffix == ".model" else next(iter(sorted(place.glob("*.model"))))
        return _load_sentencepiece(file)
    if not place.exists() and (place.is_absolute() or str(path).startswith(".") or str(path).count("/") > 1):
        raise TokenizerError(f"There is no folder {path}. Set --tokenizer to a Hugging Face folder or a .model file.")
    from transformers import AutoTokenizer  # slow to import, and the game never needs it

    try:
        loaded = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # the Rust half of `tokenizers` raises the bare class on a bad file
        raise TokenizerError(
            f"No tokenizer can be read from {path}: {_first_line(error)} "
            "Wanted a folder with tokenizer.json and tokenizer_config.json, a hub name, or a SentencePiece .model file."
        ) from error
    return HFTokenizer(loaded, str(path), _generation_eos_ids(place))


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Text of ids, special tokens kept and nothing cleaned up.

    Of a tokenizer whose class leaves decoding to `tokenizers`, that library is asked itself: on the way there `transformers`
    looks at the type of each id.
    """
    if _leaves(tokenizer, ("decode", "_decode")):
        return functools.partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    return functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _leaves(tokenizer: Any, methods: Sequence[str]) -> bool:
    """Whether the class of `tokenizer` leaves `methods` to `tokenizers`."""
    from transformers import PreTrainedTokenizerFast

    own = type(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(own, name) is getattr(PreTrainedTokenizerFast, name) for name in methods
    )


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Returns when every id of `tokenizer` has a row among the model's `vocab_size` embeddings.

    Raises:
        TokenizerError: some have none. (More rows than ids are in order: rows are padded.)
    """
    largest = max(tokenizer.vocab_size - 1, *tokenizer.eos_token_ids)
    if largest >= vocab_size:
        raise TokenizerError(
            f"The tokenizer has ids up to {largest} and the model {vocab_size} embeddings (ids 0 to {vocab_size - 1}): "
            "they do not belong together. Set --tokenizer to the one that the model was trained with."
        )


def _load_sentencepiece(file: Path) -> SentencePieceTokenizer:
    if not file.is_file():
        raise TokenizerError(f"There is no SentencePiece model {file}. Set --tokenizer to an existing .model file.")
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceTokenizer(SentencePieceProcessor(model_file=str(file)), str(file))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{file} is not a SentencePiece model: {_first_line(error)} Export it anew.") from error


def _only_sentencepiece(folder: Path) -> bool:
    own = ("tokenizer.json", "tokenizer_config.json", "config.json")
    return any(folder.glob("*.model")) and not any((folder / name).exists() for name in own)


def _generation_eos_ids(folder: Path) -> list[int]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise TokenizerError(f"{file} is not a JSON object: {_first_line(error)} Mend it or take it away.") from error
    return [ids] if isinstance(ids, int) else [int(i) for i in ids or []]


def _no_chat_template(name: str) -> TokenizerError:
    return TokenizerError(
        f"The tokenizer {name} has no chat template, and prompt_style is 'chat'. "
        "Use --prompt-style plain, where the template is the whole prompt."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".") + "."
