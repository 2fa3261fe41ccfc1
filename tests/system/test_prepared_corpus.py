"""A real run whose corpus is a prepared store, of texts in three scripts."""

import json

import pytest
from demo_runs import ROOT, rows, run, write_text

from megatron_pz.corpus.extract import PrepareSettings
from megatron_pz.corpus.prepare import prepare
from megatron_pz.corpus.store import CorpusStore
from megatron_pz.game.masking import MASK_TOKEN


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts" / "written").mkdir(parents=True)
    write_text(folder / "texts" / "en.jsonl")
    for name in ("ko.jsonl", "zh.jsonl", "ATTRIBUTION.txt"):
        (folder / "texts" / "written" / name).write_bytes((ROOT / "examples" / "corpora" / name).read_bytes())
    settings = PrepareSettings(str(ROOT / "examples" / "demo_policy"), min_tokens=8, held_out=0.3, seed=2)
    card = prepare([folder / "texts"], folder / "store", settings)
    assert card["train"]["paragraphs"] + card["held_out"]["paragraphs"] == 16
    return folder / "store"


def test_a_run_plays_a_store_learns_scores_its_held_out_part_and_records_what_it_read(tmp_path, store):
    flags = {"held_out_path": store / "held_out", "task": "random_span", "train_iters": 2, "eval_interval": 2}
    assert run(tmp_path / "run", store, paragraphs_per_step=6, lr=1e-3, span_max_words=2, **flags) == 0
    texts = {part: {p.id: p.text for p in CorpusStore(store / part)} for part in (".", "held_out")}
    played = rows(tmp_path / "run", "rollouts.jsonl")
    assert {row["step"] for row in played} == {1, 2} and len(played) == 2 * 6 * 4 * 4
    assert {row["paragraph_id"] for row in played} <= texts["."].keys()
    languages = {row["paragraph_id"].split(":")[0] for row in played}
    assert {"ko", "zh"} <= languages
    for row in played:
        asked = row["prompt"].replace(MASK_TOKEN, row["target"])
        assert asked.endswith(texts["."][row["paragraph_id"]]) and MASK_TOKEN in row["prompt"]

    metrics = rows(tmp_path / "run")
    assert [row["step"] for row in metrics] == [0, 1, 2] and "eval/held_out/accuracy" in metrics[-1]
    examined = {row["paragraph_id"] for row in rows(tmp_path / "run", "eval.jsonl") if row["set"] == "held_out"}
    assert examined and examined <= texts["held_out"].keys()
    told = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert told["paragraphs"]["read"] == told["paragraphs"]["kept"] == len(texts["."])
    assert "Chinese paragraphs written for megatron_pz, CC0" in told["attribution"] and told["hashes"]
