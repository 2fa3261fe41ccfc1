"""From files to paragraphs that can be played."""

import json

import pytest
from builders import ByteTokenizer

from megatron_pz.config.schema import Config, CorpusConfig, TaskConfig
from megatron_pz.corpus.playable import read_playable
from megatron_pz.errors import CorpusError

CONFIG = Config(
    corpus=CorpusConfig(min_paragraph_tokens=5, max_paragraph_tokens=20, skip_bad_lines=True),
    task=TaskConfig(max_prompt_tokens=22),
)


def read(path, config=CONFIG):
    tokenizer = ByteTokenizer()
    return read_playable(str(path), config, tokenizer, lambda text: tokenizer.encode(f"<gen>{text}"))


def test_paragraphs_out_of_range_and_bad_lines_are_left_out_and_counted(tmp_path):
    path = tmp_path / "text.jsonl"
    texts = ["four", "a good one", "one that is too long by far", "prompt is too long"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "no JSON\n")
    paragraphs, counts = read(path)
    assert [paragraph.text for paragraph in paragraphs] == ["a good one"]
    assert sum(counts.values()) > len(texts)  # read, kept and left out


def test_a_corpus_without_anything_to_play_is_refused_by_its_name(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "four"}) + "\n")
    with pytest.raises(CorpusError, match=r"text.jsonl: "):
        read(path)
