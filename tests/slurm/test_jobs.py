"""The scripts of examples/slurm, submitted to a real Slurm of two nodes: what happens to a job changes none of its numbers."""

import subprocess
import sys
from pathlib import Path

import pytest
from demo_runs import ROOT, arguments, checkpoints, rows, write_text
from evaluate_samples import BBEH, write_sets
from slurm_cluster import NODES, wait_until

SCRIPTS = ROOT / "examples" / "slurm"
VARIABLES = {
    "CONFIG": str(ROOT / "examples" / "demo.toml"),
    "GPUS_PER_NODE": "1",
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}
STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    return folder, write_text(folder / "text.jsonl")


def flags(place, run_dir, **more):
    """The command line of a short run of the demo policy, without its configuration, which CONFIG names."""
    given = {"train_iters": STEPS, "save_interval": 3, "eval_interval": 4, **more}
    return arguments(run_dir, place[1], **given)[1:]


def num_rows(run_dir):
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def without_clock(run_dir):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows(run_dir)]


def run_by_hand(slurm, place, run_dir):
    """The same run, of two ranks, without Slurm; it goes on from what there is."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_pz"]
    done = subprocess.run(
        [*launch, VARIABLES["CONFIG"], *flags(place, run_dir)],
        env=slurm.env | VARIABLES,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def whole(slurm, place):
    """The run directory of a run that nothing disturbs."""
    run_by_hand(slurm, place, place[0] / "whole")
    return place[0] / "whole"


class Submitted:
    """A job of two nodes, of the script of this project, and what it has said."""

    def __init__(self, slurm, place, name):
        self.slurm, self.run_dir, self.out = slurm, place[0] / name, place[0] / f"{name}.out"
        script = str(SCRIPTS / "train.sbatch")
        self.number = slurm.submit(
            "--nodes=2", f"--output={self.out}", script, *flags(place, self.run_dir), **VARIABLES
        )

    def told(self):
        return self.out.read_text(errors="replace")[-5000:] + self.slurm.told()

    def restarted(self, times):
        wait_until(lambda: self.slurm.job(self.number)["Restarts"] == str(times), 240, self.told)

    def has_the_numbers_of(self, whole):
        assert without_clock(self.run_dir) == without_clock(whole)  # to the last bit
        assert (self.run_dir / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
        assert [row["step"] for row in rows(self.run_dir)] == list(range(STEPS + 1))
        assert any(row.get("loss") for row in rows(self.run_dir)), "no step learned anything"


@pytest.mark.timeout(900)
def test_a_job_near_its_time_limit_is_queued_again_and_ends_with_the_numbers_of_an_undisturbed_run(slurm, place, whole):
    job = Submitted(slurm, place, "stopped")
    # The time limit is near, as Slurm would say it: in the middle, not at a checkpoint's step.
    wait_until(lambda: num_rows(job.run_dir) >= 2, 240, job.told)  # one row a step, from step 0
    slurm.call("scancel", "--signal=USR1", "--batch", job.number)
    job.restarted(1)
    stopped_after = int(rows(job.run_dir)[-1]["step"])
    assert checkpoints(job.run_dir)[-1] == f"step_{stopped_after:06d}" and stopped_after < STEPS
    assert (
        f"stopped by SIGUSR1 after step {stopped_after}" in job.told() and "saved before the time limit" in job.told()
    )
    slurm.wait(job.number, "COMPLETED", told=job.told)
    assert "continuing after step" in job.told()
    job.has_the_numbers_of(whole)


@pytest.mark.timeout(900)
def test_a_job_that_loses_a_node_is_queued_again_and_what_it_left_goes_on_to_the_same_numbers(slurm, place, whole):
    job = Submitted(slurm, place, "robbed")
    wait_until(lambda: num_rows(job.run_dir) >= 5, 240, job.told)  # a checkpoint is there, of step 3
    slurm.kill_node("n2")
    wait_until(lambda: int(slurm.job(job.number)["Restarts"]) >= 1, 240, job.told)
    assert "a node does not answer: queued again" in job.told()
    assert num_rows(job.run_dir) < STEPS + 1
    # Where it runs next is Slurm's business, and with daemons of one machine that takes its time: it goes on by hand.
    slurm.call("scancel", job.number)
    slurm.wait(job.number, "CANCELLED", told=job.told)
    assert "continuing after step" in run_by_hand(slurm, place, job.run_dir)
    job.has_the_numbers_of(whole)
    slurm.start_node("n2")
    wait_until(lambda: slurm.states() == ["idle"] * len(NODES), 120, slurm.told)


def test_a_job_that_fails_is_not_queued_again(slurm, place):
    out = place[0] / "failed.out"
    script = str(SCRIPTS / "train.sbatch")
    job = slurm.submit("--nodes=2", f"--output={out}", script, "--lr=-1", **VARIABLES, MAX_RESTARTS="0")
    found = slurm.wait(job, "FAILED")
    assert found["Restarts"] == "0" and "train.lr is -1.0" in out.read_text()


def test_a_conversion_job(slurm, place):
    hf, there, back = ROOT / "examples" / "demo_policy", place[0] / "megatron", place[0] / "hf"
    size = ["--cpus-per-task=1", "--mem=1"]
    script = str(SCRIPTS / "convert.sbatch")
    out = place[0] / "convert.out"
    to = slurm.submit(*size, f"--output={out}", script, str(hf), str(there), "--to=megatron", "--verify", **VARIABLES)
    # afterok: the way back begins when the way there is done
    job = slurm.submit(
        *size,
        f"--output={out}",
        f"--dependency=afterok:{to}",
        script,
        str(there),
        str(back),
        "--to=hf",
        f"--hf-model={hf}",
        **VARIABLES,
    )
    slurm.wait(job, "COMPLETED", told=lambda: out.read_text() + slurm.told())
    assert any(back.glob("*.safetensors")) and "equals the source bit for bit" in out.read_text()


def test_an_evaluation_job(slurm, place):
    sets, scores = write_sets(place[0] / "sets", bbeh=BBEH[:2]), place[0] / "scores"
    out = place[0] / "evaluate.out"
    asked = ["--suites=bbeh", f"--data={sets}", "--max-new-tokens=4", "--prompt-style=plain"]
    job = slurm.submit(
        f"--output={out}",
        str(SCRIPTS / "evaluate.sbatch"),
        f"--out={scores}",
        f"--hf-model={ROOT / 'examples' / 'demo_policy'}",
        *asked,
        **VARIABLES,
    )
    slurm.wait(job, "COMPLETED", told=lambda: out.read_text() + slurm.told())
    assert (scores / "evaluation.json").is_file() and len(rows(scores, "graded.jsonl")) == 2


def test_a_script_that_is_bash_and_python_is_taken_by_sbatch(slurm, place):
    out = place[0] / "dry.out"
    script = str(ROOT / "examples" / "pretrain_zero_30b.sh")
    variables = {name: value for name, value in VARIABLES.items() if name not in ("CONFIG", "GPUS_PER_NODE")}
    job = slurm.submit("--nodes=2", f"--output={out}", script, "--lr=1e-6", **variables, DRY_RUN="1")
    slurm.wait(job, "COMPLETED")
    srun = "srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --nodelist n1,n2 --kill-on-bad-exit=1"
    assert out.read_text().replace("\\", "") == f"CONFIG='' NNODES=2 {srun} bash {script} --lr=1e-6\n"
    task = slurm.call(
        "env",
        *(f"{name}={value}" for name, value in variables.items()),
        "DRY_RUN=1",
        *srun.split(),
        "--gpus-per-node=8",
        script,
    )
    lines = sorted(task.splitlines(), key=lambda line: "is_host=0" in line)
    assert len(lines) == 2
    for line, is_host in zip(lines, (1, 0), strict=True):
        assert "--nproc-per-node 8 --max-restarts 3 --nnodes 2 --rdzv-backend c10d" in line  # a node's GPUs, by Slurm
        assert f"is_host={is_host}" in line and line.endswith(f"{script}")


@pytest.mark.parametrize("path", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_a_script_is_correct_bash(path: Path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
