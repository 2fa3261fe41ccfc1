"""Tokenizers from Hugging Face folders and SentencePiece files, made here."""

import json

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_pz.corpus.tokenizer import HFTokenizer, check_vocab, load_tokenizer
from megatron_pz.errors import TokenizerError

TEXTS = ["Paris is the capital of France.", "The Seine flows through Paris and on to the sea."] * 4
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _save_hf(folder, *, chat=True, bos=False, eos="<eos>", generation=None):
    """A byte-level BPE as a Hugging Face folder; ids 0 <eos>, 1 <|im_start|>, 2 <|im_end|>, 3 <bos>, 4 <pad>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<eos>", "<|im_start|>", "<|im_end|>", "<bos>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    )
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 3), ("<eos>", 0)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    config |= {"eos_token": eos} if eos else {}
    config |= {"chat_template": CHAT} if chat else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return load_tokenizer(_save_hf(tmp_path_factory.mktemp("hf") / "tok"))


@pytest.fixture(scope="module")
def spm_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "m"),
        vocab_size=286,
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "m.model"


# Without the brackets of special tokens, which decoding leaves out.
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="|")))
def test_text_survives_a_byte_level_tokenizer(hf, text):
    assert hf.decode(hf.encode(text)) == text


def test_the_end_tokens_are_the_tokenizers_own_first_then_the_end_of_a_turn(hf):
    assert hf.eos_token_ids == (0, 2)
    assert hf.bos_token_ids == ()
    assert hf.vocab_size == max(hf._tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize(("generation", "wanted"), [(4, (0, 4, 2)), ([4, 0], (0, 4, 2)), (None, (0, 2))])
def test_end_tokens_of_the_generation_config_count(tmp_path, generation, wanted):
    assert load_tokenizer(_save_hf(tmp_path, generation=generation)).eos_token_ids == wanted


def test_decoding_leaves_out_end_tokens_and_no_other(hf):
    ids = [1, *hf.encode("\\mask{ Paris}"), 2, 0]
    assert hf.decode(ids) == "<|im_start|>\\mask{ Paris}"


def test_spaces_before_punctuation_are_kept(hf):
    assert hf.decode(hf.encode("well , don 't .")) == "well , don 't ."


def test_a_chat_turn_is_framed_and_ready_for_the_answer(hf):
    text = hf._tokenizer.decode(hf.apply_chat("Hide a word."))
    assert text == "<|im_start|>user\nHide a word.<|im_end|>\n<|im_start|>assistant\n"


def test_what_the_tokenizer_puts_in_front_is_known_apart(tmp_path):
    tokenizer = load_tokenizer(_save_hf(tmp_path, bos=True))
    assert tokenizer.bos_token_ids == (3,)
    assert tokenizer.encode("Paris")[0] != 3 and tokenizer.encode("Paris")[-1] != 0


def test_a_missing_chat_template_names_the_way_out(tmp_path):
    tokenizer = load_tokenizer(_save_hf(tmp_path, chat=False))
    with pytest.raises(TokenizerError, match="no chat template.*--prompt-style plain"):
        tokenizer.apply_chat("x")


def test_a_sentencepiece_file_is_read(spm_file):
    tokenizer = load_tokenizer(spm_file)
    assert tokenizer.vocab_size == 286
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_ids) == ((2,), (1,))
    assert tokenizer.decode([*tokenizer.encode("Paris \u4e1c is the capital"), 2]) == "Paris \u4e1c is the capital"
    assert load_tokenizer(spm_file.parent).encode("Paris") == tokenizer.encode("Paris")
    with pytest.raises(TokenizerError, match="--prompt-style plain"):
        tokenizer.apply_chat("x")


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="There is no folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="There is no SentencePiece model"):
        load_tokenizer(tmp_path / "nowhere.model")
    with pytest.raises(TokenizerError, match="No tokenizer can be read from"):
        (tmp_path / "empty").mkdir()
        load_tokenizer(tmp_path / "empty")


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    broken = _save_hf(tmp_path / "broken")
    bad_merge = '{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":0},"merges":["x y"]}}'
    for content in ("{", "{}", bad_merge):
        (broken / "tokenizer.json").write_text(content)
        with pytest.raises(TokenizerError, match="No tokenizer can be read from"):
            load_tokenizer(broken)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    folder = _save_hf(tmp_path / "endless", eos=None)
    text = (folder / "tokenizer.json").read_text().replace("<|im_end|>", "<|im_never|>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match="no end token"):
        load_tokenizer(folder)


def test_a_vocabulary_larger_than_the_models_is_refused(hf):
    check_vocab(hf, hf.vocab_size)
    check_vocab(hf, hf.vocab_size + 64)
    with pytest.raises(TokenizerError, match=f"ids up to {hf.vocab_size - 1} and the model {hf.vocab_size - 1} embed"):
        check_vocab(hf, hf.vocab_size - 1)


@given(st.lists(st.integers(0, 299), max_size=30))
def test_decoding_past_transformers_gives_its_text_without_the_ends(hf, ids):
    kept = [i for i in ids if i not in hf.eos_token_ids]
    assert hf.decode(ids) == hf._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_a_class_with_a_decoder_of_its_own_is_asked(hf, monkeypatch):
    class Shouting(type(hf._tokenizer)):
        def _decode(self, token_ids, **options):
            return super()._decode(token_ids, **options).upper()

    monkeypatch.setattr(hf._tokenizer, "__class__", Shouting)
    assert HFTokenizer(hf._tokenizer, "shouting").decode(hf.encode("Paris")) == "PARIS"
