"""The trainer on one node and a real SGLang server on the other, in one job."""

import os
import re
import sys
import urllib.error
import urllib.request

import pytest
from demo_runs import ROOT, arguments, rows, write_text
from slurm_cluster import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a server's start alone takes half a minute
SCRIPT = str(ROOT / "examples" / "slurm" / "disaggregated.sbatch")
SERVER_PYTHON = ROOT / ".venv-sglang" / "bin" / "python"


@pytest.fixture
def submitted(slurm, tmp_path):
    """submitted(steps) -> number of a job, its run directory and its output."""
    if not SERVER_PYTHON.exists():
        pytest.skip(f"no {SERVER_PYTHON.relative_to(ROOT)}: tools/setup_env.sh server makes it")

    def submit(steps):
        run_dir, out = tmp_path / "run", tmp_path / "out"
        flags = arguments(run_dir, write_text(tmp_path / "text.jsonl"), train_iters=steps, server_python=SERVER_PYTHON)
        variables = {
            "CONFIG": str(ROOT / "examples" / "demo.toml"),
            "GPUS_PER_NODE": "1",
            "RUN_DIR": str(run_dir),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
        }
        job = slurm.submit("--nodes=2", f"--output={out}", SCRIPT, *flags[1:], **variables)
        return job, run_dir, out

    return submit


def server_url(run_dir):
    return re.search(r"--server-urls (\S+)", (run_dir / "servers" / "ready-0").read_text())[1]


def answers(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=20):
            return True
    except (urllib.error.URLError, OSError):
        return False


def test_the_trainer_waits_for_the_servers_and_ends_them(slurm, submitted):
    job, run_dir, out = submitted(2)
    slurm.wait(job, "COMPLETED", timeout_s=600, told=lambda: out.read_text() + slurm.told())
    assert [row["step"] for row in rows(run_dir)] == [1, 2]
    assert all(row["staleness/max"] == 0 for row in rows(run_dir))
    assert os.stat(run_dir / "server.key").st_mode & 0o077 == 0
    assert f"servers answer at {server_url(run_dir)}" in out.read_text()
    assert not answers(server_url(run_dir))


def test_the_time_limit_ends_the_servers_too_and_the_job_goes_on(slurm, submitted):
    job, run_dir, out = submitted(100_000)
    told = lambda: out.read_text()[-4000:] + slurm.told()  # noqa: E731
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 1, 400, told)
    url = server_url(run_dir)
    slurm.call("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", 200, told)
    assert not answers(url)
    assert "saved before the time limit" in told()
    wait_until(lambda: "continuing after step" in out.read_text(), 400, told)
    slurm.call("scancel", job)
    wait_until(lambda: set(slurm.states()) == {"idle"}, 120, told)
