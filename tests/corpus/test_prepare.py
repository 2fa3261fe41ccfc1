# ruff: noqa: E501 - wikitext as it comes
"""From sources to a store: what is cleaned, counted, kept and found again."""

import bz2
import json
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest

from megatron_pz.config.schema import Config, CorpusConfig, TaskConfig
from megatron_pz.corpus import store as corpus_store
from megatron_pz.corpus.extract import Extractor, PrepareSettings
from megatron_pz.corpus.playable import longest as longest_of
from megatron_pz.corpus.playable import read_playable
from megatron_pz.corpus.prepare import prepare
from megatron_pz.corpus.quality import quality_reason
from megatron_pz.corpus.store import CorpusStore
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.corpus.wikitext import wiki_paragraphs

TOKENIZER = str(Path(__file__).parents[2] / "examples" / "demo_policy")
HEAD = (
    '<mediawiki xml:lang="en"><siteinfo><dbname>testwiki</dbname><base>https://en.wikipedia.org/wiki/Main</base>'
    '<namespaces><namespace key="6" case="first-letter">File</namespace></namespaces></siteinfo>'
)
AMBER = """{{Infobox|name={{nested|a}}|x=1}}
'''Amber''' is the [[resin|hard resin]] of old trees,<ref name=a>{{cite|b}}</ref> found in [[clay]]<!-- hidden --> and in the sand of the sea.
{| class="wikitable"
| a || {|
| nested
|}
|}
[[File:Amber.jpg|thumb|A [[stone]] in the hand.]]
== Uses ==
* a list item that is long enough to be a paragraph of its own, were it not one of a list.
It was worn by kings {{convert|5|km}} from the sea, and by the fishers who found it on the shore &ndash; <nowiki>''so''</nowiki> they say.

The weight is <math>m = 3</math> in the mean, and that is the reason for which it is light in the water of the sea.
[[Category:Stones]]"""
LAKE = "The lake is {} metres deep in the middle of the summer, and the people of the town swim in it by night."


def page(number, title, text, space=0, redirect=""):
    return (
        f"<page><title>{escape(title)}</title><ns>{space}</ns><id>{number}</id>{redirect}"
        f"<revision><text>{escape(text)}</text></revision></page>"
    )


def dump(path, *, cut=0):
    """Two bzip2 streams, as in a multistream dump."""
    first = (
        page(1, "Amber", AMBER)
        + page(2, "Lake", LAKE.format(70))
        + page(3, "Old", "#REDIRECT [[Lake]]", redirect="<redirect/>")
    )
    second = (
        page(4, "Talk:Lake", LAKE.format(1), space=1)
        + page(5, "Pond", LAKE.format(80))
        + page(6, "Tarn", LAKE.format(70).upper())
    )
    data = bz2.compress((HEAD + first).encode()) + bz2.compress((second + "</mediawiki>").encode())
    path.write_bytes(data[: len(data) - cut])
    return path


def made(tmp_path, source, name="out", **options):
    workers = options.pop("num_workers", 1)
    settings = PrepareSettings(TOKENIZER, **({"min_tokens": 8, "held_out": 0.0} | options))
    return prepare([source], tmp_path / name, settings, num_workers=workers)


def test_a_dump_becomes_clean_paragraphs_and_each_loss_has_its_reason(tmp_path):
    card = made(tmp_path, dump(tmp_path / "wiki.xml.bz2"))
    store = CorpusStore(tmp_path / "out")
    assert [(p.id, p.title) for p in store] == [
        ("testwiki:1#0", "Amber"),
        ("testwiki:1#1", "Amber"),
        ("testwiki:2#0", "Lake"),
    ]
    assert store[0].text == "Amber is the hard resin of old trees, found in clay and in the sand of the sea."
    assert store[1].text == (
        "It was worn by kings 5 km from the sea, and by the fishers who found it on the shore – so they say."
    )
    assert store[0].source == "Wikipedia contributors, CC BY-SA 4.0 (https://en.wikipedia.org/wiki/Amber)"
    counts = card["counts"]
    assert (counts["documents"], counts["page_redirect"], counts["page_other_namespace"]) == (6, 1, 1)
    assert (counts["formula"], counts["duplicate"], counts["near_duplicate"]) == (1, 1, 1)
    assert "CC BY-SA 4.0" in (tmp_path / "out" / "ATTRIBUTION.txt").read_text()


def test_workers_change_no_byte(tmp_path):
    source = dump(tmp_path / "wiki.xml.bz2")
    one = made(tmp_path, source)
    assert made(tmp_path, source, "two", num_workers=2)["output_sha256"] == one["output_sha256"]


def test_a_cut_dump_keeps_what_was_read_and_says_where_it_broke(tmp_path):
    card = made(tmp_path, dump(tmp_path / "wiki.xml.bz2", cut=30))
    assert card["train"]["paragraphs"] == 3
    assert len(card["broken"]) == 1 and "'Old'" in card["broken"][0] and "at byte" in card["broken"][0]


def test_a_killed_run_goes_on_to_the_same_result(tmp_path, monkeypatch):
    source = tmp_path / "texts.jsonl"
    texts = [f"The {word} of the old town is as high as the church, and it stands by the river." for word in "abcdefgh"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr("megatron_pz.corpus.prepare.BATCH_DOCUMENTS", 2)
    whole = made(tmp_path, source, "whole")
    settings = PrepareSettings(TOKENIZER, min_tokens=8, held_out=0.0)
    extracted = []
    extract = Extractor.__call__

    def counted(self, batch):
        extracted.append([document.key for _, document in batch])
        return extract(self, batch)

    monkeypatch.setattr(Extractor, "__call__", counted)

    def stop(batches, size):
        if batches == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], tmp_path / "out", settings, tell=stop)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".tmp-out" / "batches").iterdir())) == 2
    assert prepare([source], tmp_path / "out", settings)["output_sha256"] == whole["output_sha256"]
    assert len(extracted) == 4 and len({tuple(keys) for keys in extracted}) == 4  # none was made twice


def test_texts_of_an_evaluation_set_are_left_out(tmp_path):
    source, test = tmp_path / "texts.jsonl", tmp_path / "test.jsonl"
    source.write_text("".join(json.dumps({"text": LAKE.format(word)}) + "\n" for word in ("two", "three")))
    test.write_text(
        json.dumps({"question": "The lake is two metres deep in the middle of the summer, and then?"}) + "\n"
    )
    card = made(tmp_path, source, evaluation=(str(test),))
    assert (card["counts"]["contaminated"], card["train"]["paragraphs"]) == (1, 1)  # 13 words up to "and" are shared


def test_documents_are_held_out_whole(tmp_path):
    source = tmp_path / "texts.jsonl"
    text = "\n\n".join(f"The {word} is in the house of the king by the sea." for word in ("cat", "dog", "cow"))
    source.write_text(
        "".join(json.dumps({"id": str(i), "text": text.replace("king", f"k{chr(97 + i)}ng")}) + "\n" for i in range(20))
    )
    made(tmp_path, source, held_out=0.5)
    train, held = CorpusStore(tmp_path / "out"), CorpusStore(tmp_path / "out" / "held_out")
    assert len(train) + len(held) == 60 and 0 < len(held) < 60
    assert not {p.id.split("#")[0] for p in train} & {p.id.split("#")[0] for p in held}


def test_a_run_believes_the_lengths_of_its_own_tokenizer_and_measures_otherwise(tmp_path):
    made(tmp_path, dump(tmp_path / "wiki.xml.bz2"))
    tokenizer = load_tokenizer(TOKENIZER)
    store = CorpusStore(tmp_path / "out")
    assert [tokenizer.encode(p.text) for p in store] and np.array_equal(
        store.tokens, [len(tokenizer.encode(p.text)) for p in store]
    )
    longest = int(store.tokens.max())
    config = Config(corpus=CorpusConfig(max_paragraph_tokens=longest - 1), task=TaskConfig(max_prompt_tokens=500))
    asked = []

    def prompt(text):
        asked.append(text)
        return tokenizer.encode(f"Hide: {text}")

    found, counts = read_playable(str(tmp_path / "out"), config, tokenizer, prompt)
    assert (len(found), counts["kept"], counts["too_long"]) == (2, 2, 1) and len(asked) == 1
    assert longest_of(found) == found[int(np.argmax([len(tokenizer.encode(p.text)) for p in found]))]


def test_the_longest_of_a_store_is_found_without_reading_the_others(tmp_path, monkeypatch):
    made(tmp_path, dump(tmp_path / "wiki.xml.bz2"))
    store = CorpusStore(tmp_path / "out", np.array([1, 2], np.uint32))
    read, cut = [], corpus_store._cut
    monkeypatch.setattr(corpus_store, "_cut", lambda data, ends, place: read.append(place) or cut(data, ends, place))
    assert longest_of(store).id == "testwiki:1#1" and len(read) == 2  # its text and its document


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("호박은 나무의 진이 굳어서 생긴 보석이다.", "ko", None),
        ("琥珀是古代樹脂形成的化石，常被做成飾品。", "zh", None),
        ("琥珀是古代樹脂形成的化石，常被做成飾品。", "ko", "wrong_script"),
        ("Amber is old resin.", "zh", "wrong_script"),
        ("Der Stein ist hart und das Harz ist alt, und die Kinder spielen mit dem Sand.", "en", "wrong_language"),
        ("1999, 2000, 2001 (3.14), 15 and 16.", "en", "few_letters"),
        ("A title without a stop", "en", "no_sentence"),
    ],
)
def test_filters_by_script_and_form(text, language, reason):
    assert quality_reason(text, language) == reason


@pytest.mark.parametrize(
    "text",
    [
        'a<ref>x<b>y</b></ref>b<REF name="x/y">q</REF >c<ref name=a /> t<ref>u</ref> v.',
        "a <ref>open, never closed, and <ref>in</ref> b.",
        "<nowiki><ref></nowiki> is how a note <ref>b</ref> begins.",
        "x<!-- <ref> -->y<ref>z<!-- </ref> --></ref>w.",
        "http://x.org/a<ref>r</ref>.Then it goes on.",
        "A<references><ref name=q>z</ref></references><references/>b.",
        "{{convert|5<ref>x</ref>|km}} away, {{efn|a <ref>b</ref>}} as said.",
        "A\n:{| class=a\n| x || {{t\n|}}\n{|\n| inner\n|}\n|-\n|<ref>x\n|}</ref>\n|} tail\nB.",
        "A {| no table |} b.\n{|\n| never closed\nC.",
        "{{Box\n|x=\n{|\n| a\n|}\n}}\nB.\n{|\n{{row}}\n|}}\nC.",
        AMBER,
    ],
)
def test_cutting_references_and_tables_out_first_changes_no_paragraph(text, monkeypatch):
    found = wiki_paragraphs(text)
    monkeypatch.setattr("megatron_pz.corpus.wikitext.cut_out", lambda text: text)
    assert wiki_paragraphs(text) == found and found


def test_a_measure_keeps_its_figures_where_a_note_stands_in_them():
    assert wiki_paragraphs("It is {{convert|5<ref>x</ref>|km}} away.") == ["It is 5 km away."]


def test_a_korean_page_loses_its_own_file_links():
    text = "[[파일:호박.jpg|섬네일|호박]]\n'''호박'''(琥珀, {{llang|en|amber}})은 [[나무]]의 진이다."
    assert wiki_paragraphs(text, ("파일",)) == ["호박(琥珀)은 나무의 진이다."]
