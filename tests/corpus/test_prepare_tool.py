"""Parquet and gzip as sources; tools/prepare_corpus.py killed on the way, and its word about sources that are cut."""

import bz2
import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_pz.corpus.extract import PrepareSettings
from megatron_pz.corpus.prepare import prepare
from megatron_pz.corpus.store import CorpusStore
from megatron_pz.errors import CorpusError

ROOT = Path(__file__).parents[2]
TOKENIZER = str(ROOT / "examples" / "demo_policy")
SETTINGS = PrepareSettings(TOKENIZER, min_tokens=8, held_out=0.0)
TOOL = [sys.executable, str(ROOT / "tools" / "prepare_corpus.py")]
FLAGS = ["--tokenizer", TOKENIZER, "--min-tokens", "8", "--held-out", "0"]
RIVER = "The river {} comes down from the hills, and the people of the town fish in it by night."
NAMES = ("Arn", "Bode", "Clun", "Dove", "Esk")


def prepared(*sources, out):
    """The tool, run to its end."""
    command = [*TOOL, *map(str, sources), str(out), *FLAGS]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def write_parquet(path, names, *, url="https://en.wikipedia.org/wiki/"):
    """As wikimedia/wikipedia has it; two rows a group."""
    rows = [
        {
            "id": str(i),
            "url": url + name,
            "title": name,
            "text": f"{RIVER.format(name)}\n\nIts {name} bed\nis of sand and of clay.",
        }
        for i, name in enumerate(names)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_gzip(path, names):
    lines = "".join(json.dumps({"id": f"r.{name}", "text": RIVER.format(name)}) + "\n" for name in names)
    path.write_bytes(gzip.compress(lines.encode()))
    return path


def test_parquet_gives_its_rows_cut_at_blank_lines_with_their_titles_and_addresses(tmp_path):
    prepare([write_parquet(tmp_path / "train-0.parquet", NAMES)], tmp_path / "out", SETTINGS)
    store = CorpusStore(tmp_path / "out")
    assert [(p.id, p.title) for p in store] == [
        (f"https://en.wikipedia.org/wiki/{name}#{number}", name) for name in NAMES for number in (0, 1)
    ]
    assert store[3].text == "Its Bode bed is of sand and of clay."
    assert store[0].source == "Wikipedia contributors, CC BY-SA 4.0 (https://en.wikipedia.org/wiki/Arn)"


def test_a_folder_of_parquet_gzip_and_text_is_read_in_the_order_of_its_paths(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    write_gzip(folder / "b" / "rivers.jsonl.gz", NAMES[:2])
    write_parquet(folder / "a.parquet", NAMES[2:3], url="https://example.org/")
    (folder / "c.txt").write_text(RIVER.format("Dee") + "\n\n" + RIVER.format("Exe"), encoding="utf-8")
    (folder / "c.png").write_bytes(b"no text")
    (folder / "ATTRIBUTION.txt").write_text(f"{RIVER.format('Ure')}", encoding="utf-8")  # of a.parquet and c.txt
    card = prepare([folder], tmp_path / "out", SETTINGS)
    store = CorpusStore(tmp_path / "out")
    ids = ["https://example.org/Clun#0", "https://example.org/Clun#1", "r.Arn#0", "r.Bode#0", "c.txt#0", "c.txt#1"]
    assert [p.id for p in store] == ids and store[2].text == RIVER.format("Arn")
    assert card["attribution"] == [RIVER.format("Ure"), "origin and licence not stated"] and card["broken"] == []


def test_parquet_without_a_text_column_is_told_with_the_columns_that_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": ["1"]}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"has the columns \['body', 'id'\]; wanted one that is called `text`"):
        prepare([tmp_path / "x.parquet"], tmp_path / "out", SETTINGS)


def test_after_kill_9_the_same_command_goes_on_to_the_same_bytes(tmp_path):
    source = tmp_path / "texts.jsonl"
    texts = [RIVER.format(f"N{n}") if n % 50 == 0 else f"no sentence {n}" for n in range(32_000)]  # 16 batches
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepare([source], tmp_path / "whole", SETTINGS)

    command = [*TOOL, str(source), str(tmp_path / "out"), *FLAGS, "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    heard = b""
    while b"\r2 batches" not in heard:
        piece = process.stderr.read1(64)
        assert piece, f"the tool ended before its second batch: {heard.decode()}"
        heard += piece
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.read()  # its workers hold this pipe as well: it ends when they are gone
    process.stderr.close()
    done = {path.name: path for path in (tmp_path / ".tmp-out" / "batches").glob("*.npz")}
    assert 2 <= len(done) < 16 and not (tmp_path / "out").exists()

    again = prepared(source, out=tmp_path / "out")  # the number of workers is no part of the task
    assert again.returncode == 0, again.stderr
    cards = [json.loads((tmp_path / name / "card.json").read_text(encoding="utf-8")) for name in ("whole", "out")]
    assert cards[0] == cards[1] and cards[0]["counts"]["documents"] == 32_000
    for name in cards[0]["output_sha256"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / ".tmp-out").exists()


def dump(path):
    pages = "".join(
        f"<page><title>{name}</title><ns>0</ns><id>{i}</id><revision><text>{RIVER.format(name)}</text></revision></page>"
        for i, name in enumerate(NAMES)
    )
    head = '<mediawiki xml:lang="en"><siteinfo><dbname>testwiki</dbname></siteinfo>'
    path.write_bytes(bz2.compress(head.encode()) + bz2.compress(pages.encode()) + bz2.compress(b"</mediawiki>"))
    return path


def test_cut_sources_end_with_status_3_and_what_stood_before_each_break_is_kept(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    dump(folder / "a.xml.bz2")
    write_parquet(folder / "b.parquet", ["Lune"])
    write_gzip(folder / "c.jsonl.gz", ["Wye"] * 3000)
    for file, cut in (("a.xml.bz2", 10), ("b.parquet", 20), ("c.jsonl.gz", 20)):
        (folder / file).write_bytes((folder / file).read_bytes()[:-cut])
    write_gzip(folder / "z.jsonl.gz", ["Usk"])
    done = prepared(folder, out=tmp_path / "out")
    assert done.returncode == 3, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("broken source: ")]
    wanted = ("ends in the middle of a bzip2 stream, at byte", "is no whole Parquet file", "what stands before is kept")
    card = (tmp_path / "out" / "CARD.md").read_text(encoding="utf-8")
    for line, file, told in zip(lines, ("a.xml.bz2", "b.parquet", "c.jsonl.gz"), wanted, strict=True):
        assert line.startswith(f"broken source: {folder / file}") and told in line and told in card
    # All pages stood before the dump's break, a Parquet file without its end has nothing to read, and the last source is whole.
    assert [p.text for p in CorpusStore(tmp_path / "out")] == [RIVER.format(name) for name in (*NAMES, "Wye", "Usk")]
