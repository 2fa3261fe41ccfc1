"""Cutting blocks out before the tree is built changes no paragraph, whatever the page."""

import bz2

import pytest
from corpus.test_prepare import AMBER, HEAD, LAKE, TOKENIZER, page
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_pz.corpus import wikitext
from megatron_pz.corpus.extract import PrepareSettings
from megatron_pz.corpus.prepare import prepare
from megatron_pz.corpus.wikitext import KEPT_TEMPLATES, wiki_paragraphs
from megatron_pz.corpus.wikitext_cut import blocks_cut_out

DROPPED = frozenset({"file", "image", "category"})
WHOLE = (
    "Amber is old. ",
    "It was found in clay, and it burns. ",
    "  lead",
    "* item",
    "# [[one]] {{b|c}}",
    ": in",
    "; term : definition",
    "* a {{b|\nc}} d",
    ":{{nowrap|x\ny}} z",
    "{{lang|en|w}}",
    "{{lang|en|\n* a\n}}",
    "{{nowrap|a\n* b}}",
    "{{convert|5|km}}",
    "{{frac|1|2}}",
    "{{reflist}}",
    "{{Box\n| x = {{small|y}}\n| z = [[c]]\n}}",
    "{{ Note \n|a}}",
    "{{a\nb}}",
    "{{a<ref/>|b}}",
    "{{#if:a|b}}",
    "{{a|[http://x y]}}",
    "{{a|http://x}}",
    "{{a|b=<small>c</small>}}",
    "{{a}}{{b}}",
    "{{{{a}}}}",
    "[[File:a.jpg|thumb|cap [[b]] {{c}}]]",
    "[[File:a.jpg|thumb|a [[b]]]]",
    "[[File:a.jpg|[http://x y]]]",
    "[[File:a.jpg|b\nc]]",
    "[[File:{{x}}.jpg]]",
    "[[Image:x.png]] after",
    "[[Category:Things]]",
    "[[:Category:x]]",
    "[[fr:x]]",
    "[[a|b]]",
    "[[a\n* b]]",
    "[[b|\n{{Box}}\n]]",
    "[http://x.org a b]",
    "http://y.org/z",
    "<ref>r {{cite|x}}</ref>",
    "<small>a {{b}}</small>",
    "<div>\n{{a}}\n* b\n</div>",
    "<li>x</li>",
    "<math>{{a}}</math>",
    "<br>",
    "&nbsp;",
    "== H ==",
    "=== {{h}} ===",
    "----",
    "{| class=x\n| a\n|}",
)
BROKEN = (
    "{{",
    "}}",
    "[[",
    "]]",
    "[",
    "]",
    "|",
    "=",
    "<",
    ">",
    "<small>",
    "</small>",
    "<li>",
    "{|",
    "|}",
    "<!--",
    "{{{1}}}",
)
BROKEN += ("==x }}==", '<span title="a>b">', "[[[a]]]", "{|\n| b\n{|\n| c\n|}\n|}", "[http://x", "{{Infobox", "-{a}-")
pieces = st.lists(st.tuples(st.sampled_from(["", "\n", "\n\n"]), st.sampled_from(WHOLE)), min_size=1, max_size=20)
mixed = st.lists(st.tuples(st.sampled_from(["", "\n"]), st.sampled_from(WHOLE + BROKEN)), min_size=1, max_size=12)


def both(text):
    """Paragraphs with the blocks cut out and without, and whether there was something to cut."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wikitext, "blocks_cut_out", lambda text, *_: seen.append(text) or text)
        slow = wiki_paragraphs(text)
    return wiki_paragraphs(text), slow, any(blocks_cut_out(one, KEPT_TEMPLATES, DROPPED) != one for one in seen)


@given(st.one_of(pieces, mixed).map(lambda found: "".join(map("".join, found))))
@settings(max_examples=400, deadline=None)
@example("{{a\n==x }}==\n}} b\nAmber is old.")
@example("{{nowrap|\n* a\n}}\nAmber is old.")
@example("* {{nowrap|a\nIt burns.}}\nAmber is old.")
@example("{{Box}}* item\n{{Box}}== H ==\nAmber is old.")
def test_no_paragraph_changes(text):
    fast, slow, _ = both(text)
    assert fast == slow


@pytest.mark.parametrize(
    ("text", "is_cut"),
    [
        ("{{Box\n|a={{b}}}}\nAmber is old.", True),
        ("* a [[b]]\nAmber is old.", True),
        ("[[File:a.jpg|thumb|[[b]]]]\nAmber is old.", True),
        ("Amber is old.\n* the last line", True),
        ("{{convert|5|km}}\nAmber is old.", False),  # leaves words
        ("[[Amber]]\nAmber is old.", False),
        ("{{Box}} Amber is old.", False),
        ("{{Box}}\nAmber is old {{b.", False),  # not closed: nothing of this page
        ("{{a\n= b }}\nAmber is old.", False),
        ("* {{nowrap|a\nb}}\nAmber is old.", False),
    ],
)
def test_what_is_cut_and_what_is_not(text, is_cut):
    fast, slow, was_cut = both(text)
    assert (fast, was_cut) == (slow, is_cut)


def test_a_dump_gives_the_same_bytes(tmp_path, monkeypatch):
    lists = "{{Infobox\n|a=[[b]]}}\n" + LAKE.format(3) + "\n* [[One]]\n* [[Two]]\n{{reflist}}\n[[Category:Lakes]]"
    pages = page(1, "Amber", AMBER) + page(2, "Lake", lists) + page(3, "Broken", "{{Box\n" + LAKE.format(4))
    (tmp_path / "wiki.xml.bz2").write_bytes(bz2.compress((HEAD + pages + "</mediawiki>").encode()))
    told = PrepareSettings(TOKENIZER, min_tokens=8, held_out=0.0)
    cards = [prepare([tmp_path / "wiki.xml.bz2"], tmp_path / "fast", told)]
    monkeypatch.setattr(wikitext, "blocks_cut_out", lambda text, *_: text)
    cards.append(prepare([tmp_path / "wiki.xml.bz2"], tmp_path / "slow", told))
    assert cards[0] == cards[1] and cards[0]["train"]["paragraphs"] >= 3
