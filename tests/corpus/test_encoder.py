"""Encoders for worker processes: the ids of the whole tokenizer, without what it takes to load one."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_pz.corpus import encoder
from megatron_pz.corpus.encoder import PlainEncoder, encoder_maker
from megatron_pz.corpus.extract import Extractor, PrepareSettings
from megatron_pz.corpus.store import tokenizer_digest
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.corpus.workers import elsewhere
from megatron_pz.errors import CorpusError, TokenizerError

ROOT = Path(__file__).parents[2]
POLICY = str(ROOT / "examples" / "demo_policy")
LINES = ["Paris is the capital of France.", "The Seine flows through Paris and on to the sea."] * 4
TEXTS = (
    "Paris is the capital of France.",
    "a<eos>b <eos> c",
    "<think> it <THINK> over</think>",
    "Paris <pad>\n<|im_end|>  <|im_end|>",
    "  leading, trailing  ",
    "",
    "naïve \u1e9b\u0323 ﬁ 한국어 🙂" * 40,
)


def folder(place, *, config=None, lowercase=False, truncated=False):
    """A byte-level BPE as a Hugging Face folder, with what makes special tokens special."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<pad>", "<|im_end|>"]
    bpe.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    )
    bpe.add_tokens([AddedToken("<think>", lstrip=True, rstrip=True), AddedToken("Paris", single_word=True)])
    bpe.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 1), ("<eos>", 0)]
    )
    if lowercase:
        bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    if truncated:
        bpe.enable_truncation(4)
        bpe.enable_padding(length=8, pad_id=1, pad_token="<pad>")
    place.mkdir(parents=True)
    bpe.save(str(place / "tokenizer.json"))
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"}
    (place / "tokenizer_config.json").write_text(json.dumps(whole | (config or {})))
    return str(place)


def added(content, **kinds):
    """As `added_tokens_decoder` of tokenizer_config.json has it: a token that tokenizer.json does not know."""
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **kinds}


KINDS = {
    "plain": {},
    "special tokens are cut like text": {"config": {"split_special_tokens": True}},
    "a token of the settings alone": {"config": {"added_tokens_decoder": {"302": added("</think>", special=True)}}},
    "a class that rebuilds it": {"config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
    "another that does": {"config": {"tokenizer_class": "Qwen2Tokenizer"}},
    "normalised": {"lowercase": True},
    "cut and padded by its file": {"truncated": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_tokenizer_special_tokens_too(tmp_path, kind):
    path = folder(tmp_path / "tokenizer", **KINDS[kind])
    whole, plain = load_tokenizer(path), pickle.loads(pickle.dumps(encoder_maker(path)))()
    assert isinstance(plain, PlainEncoder)
    assert [plain.encode(text) for text in TEXTS] == [whole.encode(text) for text in TEXTS]
    assert (plain.vocab_size, plain.eos_token_ids) == (whole.vocab_size, whole.eos_token_ids)
    assert tokenizer_digest(plain) == tokenizer_digest(whole)


def test_the_kinds_above_are_told_apart_by_these_texts(tmp_path):
    whole = {name: load_tokenizer(folder(tmp_path / name, **kind)) for name, kind in KINDS.items()}
    seen = {name: [tokenizer.encode(text) for text in TEXTS] for name, tokenizer in whole.items()}
    for name in (
        "special tokens are cut like text",
        "a token of the settings alone",
        "a class that rebuilds it",
        "normalised",
    ):
        assert seen[name] != seen["plain"], name


@pytest.fixture(scope="module")
def demo():
    return load_tokenizer(POLICY), encoder_maker(POLICY)()


@given(st.lists(st.one_of(st.text(), st.sampled_from(["<eos>", "<pad>", " ", "\n"]))).map("".join))
@settings(deadline=None)
def test_the_demo_policys_ids_for_any_text(demo, text):
    whole, plain = demo
    assert plain.encode(text) == whole.encode(text)


def test_a_tokenizer_that_does_not_leave_encoding_to_the_library_is_loaded_whole(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    whole, found = load_tokenizer(tmp_path), encoder_maker(str(tmp_path))()
    assert not isinstance(found, PlainEncoder)
    assert found.encode("naïve</s>") == whole.encode("naïve</s>") != []


def test_one_that_encodes_otherwise_is_loaded_whole(monkeypatch):
    monkeypatch.setattr(encoder.PlainEncoder, "encode", lambda self, text: [len(text)])
    assert encoder_maker(POLICY).func is load_tokenizer


def loaded_by_a_worker(make_encoder):
    """What heavy packages a process has that does what a worker does before its first batch."""
    Extractor(PrepareSettings(POLICY), make_encoder).tokenizer.encode("Paris")
    return sorted({"torch", "transformers"} & set(sys.modules))


READER = """
import sys
from megatron_pz.corpus.encoder import encoder_maker
if __name__ == "__main__":
    assert encoder_maker(sys.argv[1])().encode("Paris")
    print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_neither_workers_nor_the_reader_load_transformers(tmp_path):
    assert elsewhere(loaded_by_a_worker, encoder_maker(POLICY)) == []
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, str(tmp_path / "reader.py"), POLICY]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_process_that_is_ended_from_outside_is_told():
    with pytest.raises(CorpusError, match="ended before it answered.*--workers"):
        elsewhere(os._exit, 9)


def test_a_tokenizer_that_is_not_there_is_told_by_the_process_that_looked(tmp_path):
    with pytest.raises(TokenizerError, match="There is no folder"):
        elsewhere(load_tokenizer, str(tmp_path / "nowhere"))
