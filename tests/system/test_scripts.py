"""The scripts of examples/ are bash and Python at once: started in each way that a cluster knows, they train."""

import os
import subprocess
import sys

import pytest
from demo_runs import ROOT, rows, tiny_policy, write_text

SCRIPTS = sorted((ROOT / "examples").glob("pretrain_zero_*.sh"))
BIG = ROOT / "examples" / "pretrain_zero_30b.sh"
NO_SLURM = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
ENVIRONMENT = NO_SLURM | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def started(command, **variables):
    return subprocess.run(
        [*map(str, command)], env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=200, check=False
    )


def dry(script, *flags, **variables):
    done = started(["bash", script, *flags], DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_bash_and_python_and_has_its_configurations(script):
    assert os.access(script, os.X_OK)
    compile(script.read_text(), str(script), "exec")
    assert started(["bash", "-n", script]).returncode == 0
    run = (
        f"{sys.executable} -m torch.distributed.run --nproc-per-node 8 --max-restarts 3 --standalone {script} --lr 1e-6"
    )
    assert dry(script, "--lr", "1e-6", GPUS_PER_NODE="8") == f"CONFIG='' NNODES=1 {run}"
    names = [f"{script.stem}_{nodes}node" for nodes in (1, 2, 4, 8)] if script == BIG else [script.stem]
    for name in names:
        assert script.with_name(f"{name}.toml").is_file()


def test_several_nodes_are_told_where_they_stand_by_slurm_or_by_the_user():
    told = {"NNODES": "2", "GPUS_PER_NODE": "4"}
    by_hand = dry(BIG, NODE_RANK="1", MASTER_ADDR="first", MAX_RESTARTS="1", **told)
    assert "--nproc-per-node 4 --max-restarts 1 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint first:29500" in by_hand
    assert "is_host=0" in by_hand
    missing = started(["bash", BIG], **told)
    assert missing.returncode != 0 and "set NODE_RANK to the number of this node, 0 to 1" in missing.stderr
    slurm = {
        "SLURM_JOB_ID": "123",
        "SLURM_STEP_ID": "0",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURMD_NODENAME": "n2",
    }
    task = dry(BIG, NODE_ADDRESSES="n1=10.0.0.1 n2=10.0.0.2 ", GPUS_PER_NODE="4", **slurm)
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:20984 --rdzv-id 123.0" in task
    assert "is_host=0 --local-addr 10.0.0.2" in task


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_dry_run_by_torchrun_trains_nothing(script):
    """Its ranks run the Python half, which no line of launch.sh stands before."""
    ranks = {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    done = started([sys.executable, script, "--lr", "1e-6"], DRY_RUN="1", **ranks)
    config = script.with_name("pretrain_zero_30b_2node.toml" if script == BIG else f"{script.stem}.toml")
    assert (done.returncode, done.stdout) == (0, f"16 ranks: -m megatron_pz {config} --lr 1e-6\n"), done.stderr
    silent = started([sys.executable, script], DRY_RUN="1", **ranks | {"RANK": "1"})
    assert (silent.returncode, silent.stdout) == (0, ""), silent.stderr


@pytest.mark.parametrize(
    "way",
    [
        ["bash"],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"],
    ],
    ids=["bash", "torchrun", "torchrun --no-python"],
)
def test_a_script_trains_however_it_is_started(tmp_path, way):
    settings = [
        ("--hf-model", tiny_policy(tmp_path / "policy")),
        ("--init", "random"),
        ("--task", "continue_pt"),
        ("--data-path", write_text(tmp_path / "text.jsonl")),
        ("--held-out-path", ""),
        ("--run-dir", tmp_path / "run"),
        ("--train-iters", 1),
        ("--paragraphs-per-step", 2),
        ("--eval-interval", 0),
    ]
    flags = [f"{name}={value}" for name, value in settings]
    flags += ["--no-tensorboard", "--no-write-page", "--no-export-hf"]
    done = started([*way, BIG, *flags], CONFIG=str(ROOT / "examples" / "demo.toml"), GPUS_PER_NODE="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "checkpoints" / "step_000001" / "manifest.json").is_file()
