"""The embedded engine in layouts, under real torchrun: every sampled token is that of one process, log-probs within 1e-5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from programs import on_ranks

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "layouts" / "engine_worker.py"
TOLERANCE = 1e-5  # float32, absolute; reached: 6.2e-6
# Which ranks tell rank 0 what their replica has sampled: one of each group that computes together.
SPEAKERS = {
    "dense dp2": [0, 1],
    "dense tp2": [0],
    "dense tp2 sp": [0],
    "dense cp2": [0, 1],  # each has whole weights, and samples whole sequences
    "moe cp2 ep2": [0],
    "moe dp2": [0, 1],
    "moe ep2": [0],
    "moe tp2": [0],
    "moe tp2 sp ep2": [0],
    "dense tp2 dp2": [0, 2],
    "moe ep2 dp4": [0, 2],
    "moe tp2 sp ep2 dp2": [0, 2],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Reports of one, two and four ranks."""
    folder, found = tmp_path_factory.mktemp("engine"), {}
    for which, ranks in (("one", 1), ("two", 2), ("four", 4)):
        out = folder / f"{which}.json"
        on_ranks(ranks, WORKER, out, which, timeout_s=300)
        found |= json.loads(out.read_text())
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", SPEAKERS)
def test_a_layout_samples_the_tokens_of_one_process(results: dict[str, Any], case: str) -> None:
    one, here = results[case.split()[0]], results[case]
    assert here["speakers"] == SPEAKERS[case]
    differences = []
    for expected, found in zip(one["done"], here["done"], strict=True):  # with the first weights, then the second
        for wanted, done in zip(expected, found, strict=True):
            for field in ("prompt_ids", "token_ids", "finish_reason", "weight_versions"):
                assert done[field] == wanted[field]
            differences += [abs(a - b) for a, b in zip(done["logprobs"], wanted["logprobs"], strict=True)]
    assert len(differences) > 300
    assert max(differences) < TOLERANCE


def test_the_second_weights_sample_something_else_and_say_their_version(results: dict[str, Any]) -> None:
    first, second = results["dense"]["done"]
    assert {version for done in first for version in done["weight_versions"]} == {4}
    assert {version for done in second for version in done["weight_versions"]} == {5}
    assert [done["token_ids"] for done in first] != [done["token_ids"] for done in second]


def test_replicas_share_the_work_and_each_prefills_a_group_s_prompt_once(results: dict[str, Any]) -> None:
    for model in ("dense", "moe"):
        one, halves = results[model]["work"][0], results[f"{model} dp2"]["work"]
        assert sum(half["decoded_tokens"] for half in halves) == one["decoded_tokens"]
        assert max(half["decoded_tokens"] for half in halves) < 0.6 * one["decoded_tokens"]
        asked = sum(len(done["prompt_ids"]) for done in results[model]["done"][0] + results[model]["done"][1])
        assert one["prefilled_tokens"] < one["prompt_tokens"] < asked


def test_pipeline_stages_are_refused_with_the_way_out(results: dict[str, Any]) -> None:
    assert "pipeline_model_parallel_size is 2" in results["dense pp2"]["error"]
    assert "sglang" in results["dense pp2"]["error"]
