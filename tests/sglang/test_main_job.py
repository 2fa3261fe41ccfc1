"""The main job with a real SGLang server: every transport, rounds ahead, stragglers, shared memory (small runs)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from demo_runs import ROOT, TEXT, arguments, rows, run, write_text
from metric_ranges import out_of_range

from megatron_pz.config.load import load_config
from megatron_pz.platform.select import select_platform
from megatron_pz.report.metrics import WHEN

select_platform("cpu")  # before Megatron is imported

from megatron_pz.train.mismatch import mismatch_budget  # noqa: E402

POLICY = ROOT / "examples" / "demo_policy"
LEARNS = {"n_masks_per_paragraph": 6, "n_predictions_per_mask": 8}  # nearly every round has groups that differ
SMALL = {"paragraphs_per_step": 2, "n_masks_per_paragraph": 4, "n_predictions_per_mask": 4}


@pytest.fixture(scope="module")
def place(launch, tmp_path_factory):
    """Flags of a run that attaches to a server of the demo policy, and where to put it."""
    served = launch(POLICY, **{"context-length": 512})
    folder: Path = tmp_path_factory.mktemp("jobs")
    (folder / "key").write_text(served.api_key)
    flags = {"engine": "sglang", "server_urls": served.url, "api_key_file": folder / "key", **SMALL}
    flags["data_path"] = write_text(folder / "text.jsonl", TEXT * 8)
    yield folder, flags
    served.process.stop(at_once=True)


def job(place, name, steps, **flags):
    """Metrics of a run, which must end well; one of the same name is not made again."""
    folder, common = place
    given = {**common, "train_iters": steps, **flags}
    if not (folder / name).exists():
        assert run(folder / name, given.pop("data_path"), **given) == 0
    found = rows(folder / name)
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    for row in found:
        assert out_of_range(row) == []
    return found


@pytest.mark.parametrize("transport", ["tensor", "disk", "distributed"])
def test_server_and_trainer_agree_in_every_step(place, transport):
    found = job(place, transport, 4, weight_transport=transport, verify_weights=True, lr=1e-3, **LEARNS)
    learned = [row for row in found if "grad_norm" in row]  # in others no group had anything to teach
    assert len(learned) >= 2
    worst = max(row["mismatch/max_abs"] for row in learned)
    print(
        f"\n{transport}: largest difference {worst:.1e}, seconds to hand over {[row['time/sync_s'] for row in found]}"
    )
    assert worst < 1e-4
    assert all(row["staleness/max"] == 0 for row in found)


LAYOUTS = {
    "pp2 distributed": {"pipeline_model_parallel_size": 2, "weight_transport": "distributed"},
    "tp2 sp tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "weight_transport": "tensor"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_of_two_ranks_reach_the_server_whole(place, name):
    folder, common = place
    flags = {**common, "train_iters": 4, "lr": 1e-3, "verify_weights": True, **LEARNS, **LAYOUTS[name]}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "megatron_pz", *arguments(folder / name, flags.pop("data_path"), **flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    learned = [row for row in rows(folder / name) if "grad_norm" in row]
    assert len(learned) >= 2
    worst = max(row["mismatch/max_abs"] for row in learned)
    print(f"\n{name}: largest difference {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize("ahead", [1, 2])
def test_rounds_ahead_are_at_most_so_many_updates_old(place, ahead):
    found = job(place, f"ahead{ahead}", 6, async_steps=ahead, lr=1e-4, save_interval=1, keep=9)
    print(f"\n{ahead} ahead: staleness {[(row['staleness/mean'], row['staleness/max']) for row in found]}")
    assert found[0]["staleness/max"] == 0
    assert 1 <= max(row["staleness/max"] for row in found) <= ahead
    rollouts = rows(place[0] / f"ahead{ahead}", "rollouts.jsonl")
    masks = [r["mask_id"] for r in rollouts if r["role"] == "mask"]
    assert len(masks) == len(set(masks)) == 6 * 2 * 4
    # Where only a few tokens are stale there may be nothing to explain.
    stale = max(found, key=lambda row: row["staleness/mean"])["step"]
    config = load_config([str(place[0] / f"ahead{ahead}" / "config.toml")])
    budget = mismatch_budget(config, place[0] / f"ahead{ahead}", [stale])
    print("\n".join(budget.told()))
    assert budget.lines[0].cause == "stale versions" and budget.unexplained < 1e-4


def impatient(place, how):
    return job(place, how, 4, stragglers=how, over_sampling=0.5, lr=1e-4)


@pytest.mark.parametrize("how", ["cut", "continue"])
def test_a_round_ends_before_its_slowest_paragraphs(place, how):
    found = impatient(place, how)
    key = "rounds/paragraphs_cut" if how == "cut" else "rounds/paragraphs_continued"
    assert all(row[key] == 1 for row in found)
    rollouts = rows(place[0] / how, "rollouts.jsonl")
    by_step = {step: {r["paragraph_id"] for r in rollouts if r["step"] == step} for step in range(1, 5)}
    masks = [r["mask_id"] for r in rollouts if r["role"] == "mask"]
    assert all(len(played) <= 2 for played in by_step.values())
    assert len(masks) == len(set(masks)) == 4 * 2 * 4


def test_with_shared_memory_the_same_is_learned_and_each_phase_is_measured(place):
    for row in job(place, "colocated", 3, colocate=True):
        assert 0 < row["memory/trainer_asleep_bytes"] and 0 < row["memory/trainer_awake_bytes"]
        assert row.get("mismatch/max_abs", 0) < 1e-4


def test_every_metric_of_servers_is_written(place):
    found = [*impatient(place, "cut"), *impatient(place, "continue"), *job(place, "colocated", 3, colocate=True)]
    written = {name for row in found for name in row}
    of_servers = {name for name, condition in WHEN.items() if "sglang" in condition}
    assert {name for name in of_servers if "routing_replay" not in WHEN[name]} <= written  # with it: test_moe_job.py
