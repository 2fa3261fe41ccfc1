"""torchrun's restart of a run whose servers are others': one lost in the middle of handing weights over."""

import json

import pytest
from demo_runs import ROOT, TEXT, arguments, rows, write_text
from torchrun_runs import end, start

LIMIT_S = 400.0
SMALL = {"paragraphs_per_step": 2, "n_masks_per_paragraph": 6, "n_predictions_per_mask": 8}
FLAGS = {
    "engine": "sglang",
    "train_iters": 2,
    "save_interval": 1,
    "lr": 1e-3,
    "weight_bucket_mib": 1,
    "verify_weights": True,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # two starts of two ranks, and a server's


@pytest.fixture(scope="module")
def served(launch):
    server = launch(ROOT / "examples" / "demo_policy", **{"context-length": 512})
    yield server
    server.process.stop(at_once=True)


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_servers_that_have_a_part_of_the_weights_get_all_of_them(served, tmp_path, transport):
    run_dir = tmp_path / "run"
    (tmp_path / "key").write_text(served.api_key)
    flags = {
        **FLAGS,
        **SMALL,
        "server_urls": served.url,
        "api_key_file": tmp_path / "key",
        "weight_transport": transport,
    }
    program = [str(ROOT / "tests" / "sglang" / "killed_at.py")]
    program += arguments(run_dir, write_text(tmp_path / "text.jsonl", TEXT * 4), **flags)
    process = start(run_dir, program, PZ_TEST_KILLS=json.dumps({"0": (0, "push", 1)}), PYTHONWARNINGS="ignore")
    try:
        code, told = process.wait(LIMIT_S), (run_dir / "out").read_text()
    finally:
        end([(process, run_dir)])
    assert code == 0, told[-4000:]
    assert told.count("torchrun has started the ranks again") == 1
    assert "was lost" not in told and "did not take" not in told
    learned = [row for row in rows(run_dir) if "grad_norm" in row]
    assert [row["step"] for row in rows(run_dir)] == [1, 2] and learned
    worst = max(row["mismatch/max_abs"] for row in learned)
    print(f"\n{transport}: largest difference {worst:.1e}")
    assert worst < 1e-4
