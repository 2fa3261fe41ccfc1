"""Two ranks save and verify together: what one meets, both are told."""

import json
from pathlib import Path

import pytest
from demo_runs import tree
from programs import on_ranks

WORKER = Path(__file__).parents[1] / "layouts" / "save_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("ranks")
    on_ranks(2, WORKER, place)
    return place


@pytest.fixture
def told(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.timeout(220)
def test_what_is_written_in_the_background_is_the_same_to_the_bit(folder, told):
    for rank in told:
        assert rank["plain"] == str(folder / "plain" / "step_000001")
        assert (rank["at once"], rank["background"]) == ("None", str(folder / "background" / "step_000001"))
    written = tree(folder / "plain")
    assert written == tree(folder / "background")
    assert {"step_000001/shards/__0_0.distcp", "step_000001/shards/__1_0.distcp"} <= written.keys()


def test_where_one_rank_s_disk_refuses_both_are_told_and_nothing_is_left(told):
    place = "step_000002: the checkpoint could not be written"
    assert f"{place} (File too large)" in told[0]["refused"] and place in told[1]["refused"]
    assert [rank["left"] for rank in told] == [["step_000001"], ["step_000001"]]


def test_damage_that_one_rank_finds_refuses_the_checkpoint_on_all(told):
    for rank in told:
        for name in ("__0_0", "__1_0"):
            assert f"shards/{name}.distcp was altered after it was written" in rank["damaged"]
