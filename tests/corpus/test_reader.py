"""What a JSONL corpus becomes, and how each fault of it is told."""

import json

import pytest

from megatron_pz.corpus.reader import read_paragraphs
from megatron_pz.errors import CorpusError


def _write(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode("utf-8")) + b"\n" for line in lines))
    return file


def _line(**fields):
    return json.dumps(fields)


def test_a_line_becomes_a_paragraph_with_all_its_fields(tmp_path):
    file = _write(tmp_path / "leads.jsonl", _line(text="Paris.", id="a", title="Paris", source="Wikipedia", url="x"))
    [paragraph], counts = read_paragraphs(file)
    assert (paragraph.id, paragraph.text, paragraph.title, paragraph.source) == ("a", "Paris.", "Paris", "Wikipedia")
    assert counts == {"read": 1}


def test_an_id_is_file_and_line_where_none_is_given_and_blank_lines_keep_their_number(tmp_path):
    file = _write(tmp_path / "leads.jsonl", _line(text="one"), "", "   ", _line(text="four"), _line(text="five", id=7))
    paragraphs, _ = read_paragraphs(file)
    assert [paragraph.id for paragraph in paragraphs] == ["leads:1", "leads:4", "7"]


def test_a_folder_is_read_in_the_order_of_its_paths_with_subfolders(tmp_path):
    _write(tmp_path / "b.jsonl", _line(text="third"))
    _write(tmp_path / "a" / "y.jsonl", _line(text="second"))
    _write(tmp_path / "a" / "x.jsonl", _line(text="first"))
    _write(tmp_path / "notes.txt", "not read")
    paragraphs, _ = read_paragraphs(tmp_path)
    assert [(p.id, p.text) for p in paragraphs] == [("a/x:1", "first"), ("a/y:1", "second"), ("b:1", "third")]


def test_text_is_kept_to_the_character_and_a_byte_order_mark_is_not_text(tmp_path):
    text = "  Zürich \u4e1c\u4eac \U0001f5fc cafe\u0301\u2028end "
    file = _write(tmp_path / "t.jsonl", b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode())
    [paragraph], _ = read_paragraphs(file)
    assert paragraph.text == text


BAD = {
    "not_json": '{"text": "cut o',
    "not_an_object": '["text"]',
    "no_text": '{"body": "Paris."}',
    "bad_field": '{"text": "half a pair \\ud800"}',
    "not_utf8": b'{"text": "\xff"}',
    "duplicate_id": '{"text": "again", "id": "t:1"}',
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_line_stops_with_its_place_and_the_way_out(tmp_path, reason):
    file = _write(tmp_path / "t.jsonl", _line(text="good"), BAD[reason])
    with pytest.raises(CorpusError) as error:
        read_paragraphs(file)
    message = str(error.value)
    assert f"{file}:2" in message and "--skip-bad-lines" in message and "`text`" in message


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_line_is_counted_by_its_reason_where_it_may_be_skipped(tmp_path, reason):
    file = _write(tmp_path / "t.jsonl", _line(text="good"), BAD[reason], _line(text="better"))
    paragraphs, counts = read_paragraphs(file, skip_bad_lines=True)
    assert [p.text for p in paragraphs] == ["good", "better"]
    assert counts == {"read": 2, reason: 1}


@pytest.mark.parametrize("value", [3, None, ["a"], {"a": 1}, True])
def test_a_text_that_is_no_string_is_refused(tmp_path, value):
    with pytest.raises(CorpusError, match=f"`text` of type {type(value).__name__}"):
        read_paragraphs(_write(tmp_path / "t.jsonl", _line(text=value)))


def test_a_repeated_id_names_both_places(tmp_path):
    file = _write(tmp_path / "t.jsonl", _line(text="a", id="x"), _line(text="b"), _line(text="c", id="x"))
    with pytest.raises(CorpusError, match=r"t\.jsonl:3: found the id 'x', already used at .*t\.jsonl:1"):
        read_paragraphs(file)


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_corpus_is_refused(tmp_path, lines):
    with pytest.raises(CorpusError, match=r"holds no paragraph: 1 file\(s\) read"):
        read_paragraphs(_write(tmp_path / "t.jsonl", *lines))


def test_a_corpus_of_bad_lines_alone_says_what_they_were(tmp_path):
    file = _write(tmp_path / "t.jsonl", "nonsense", "[1]")
    with pytest.raises(CorpusError, match="not_an_object 1, not_json 1"):
        read_paragraphs(file, skip_bad_lines=True)


def test_a_path_without_text_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"no file or folder .*nowhere"):
        read_paragraphs(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"holds no \*\.jsonl file"):
        read_paragraphs(tmp_path)
