"""A policy that lies on two ranks reaches a real server by handles, whichever rank's memory it reads (sync/handles.py, export.py).

Two real ranks over gloo; shared memory stands for memory of a GPU, and the code is the same but for the backend.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sglang_models
import torch
from transformers import AutoModelForCausalLM

from megatron_pz.engine.sglang import server as server_process

WORKER = Path(__file__).parents[1] / "layouts" / "handle_worker.py"
TOLERANCE = 1e-4  # float32; reached: see the figures that the test prints
PROMPTS = [list(range(3 + start, 40 + 2 * start)) for start in range(4)]
BUCKET_BYTES = 2**20 // 3  # of 1 MiB, which is shared by three copies
EMBEDDING_BYTES = 512 * 128 * 4
TP2, PP2, EP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "pipeline", "expert"))
CASES = {  # by server: case, the trainer's layout, the trainer's ranks whose memory the server's ranks read
    "server": {
        "tp2": (TP2, [0]),
        "tp2, memory of rank 1": (TP2, [1]),
        "pp2": (PP2, [0]),
        "pp2, memory of rank 1": (PP2, [1]),
    },
    "moe_server": {
        "ep2": (EP2, [0]),
        "tp2 sp ep2, memory of rank 1": (TP2 | EP2 | {"sequence_parallel": True}, [1]),
    },
}


def hand(served, cases, make, place):
    """What the worker found by case, and the folder of each case's weights: each case has weights of its own."""
    folders = {name: make(place / str(seed), seed=seed) for seed, name in enumerate(cases, 30)}
    job = [
        {"name": name, "folder": str(folders[name]), "url": served.url, "layout": layout, "owners": owners}
        for name, (layout, owners) in cases.items()
    ]
    (place / "job.json").write_text(json.dumps({"cases": job, "prompts": PROMPTS}))
    paths = os.pathsep.join([str(WORKER.parents[2]), str(WORKER.parents[1])])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (place / "log").open("w") as log:  # no pipe: torch's keeper of shared memory outlives the ranks, and holds it
        done = subprocess.run(
            [*launch, str(WORKER), str(place / "job.json")],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "SERVER_KEY": served.api_key},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0, (place / "log").read_text()[-6000:]
    return json.loads((place / "answers.json").read_text()), folders


def largest_difference(answers, folder):
    """Between the server's log-probs and those of `transformers` for the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst = 0.0
    for answer in answers:
        ids = torch.tensor([answer["prompt"] + answer["tokens"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        start = len(answer["prompt"])
        found = log_probs[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]
        worst = max(worst, float((found - torch.tensor(answer["logprobs"])).abs().max()))
    return worst


def check(cases, found, folders):
    """Every case's server had the whole of that case's weights, each tensor once, in buckets within the bound."""
    assert list(found) == list(cases)
    for version, (case, about) in enumerate(found.items(), 1):
        difference = largest_difference(about["answers"], folders[case])
        print(f"\n{case}: largest difference {difference:.1e}, {about['bytes']} bytes")
        assert difference < TOLERANCE, case
        assert {stamp for answer in about["answers"] for stamp in answer["versions"]} == {version}
        source = sum(file.stat().st_size for file in folders[case].glob("*.safetensors"))
        assert 0.98 * source < about["bytes"] <= source  # the file has a header too
        assert about["largest_bucket"] <= max(BUCKET_BYTES, EMBEDDING_BYTES)
    last = about["answers"]
    assert largest_difference(last, folders[next(iter(found))]) > 0.1  # so the comparison can fail


@pytest.mark.parametrize("name", CASES)
def test_a_server_has_the_whole_model_from_either_ranks_memory(name, request, tmp_path):
    served = request.getfixturevalue(name)
    make = sglang_models.make_dense if name == "server" else sglang_models.make_moe
    try:
        check(CASES[name], *hand(served, CASES[name], make, tmp_path))
    finally:
        served.restore()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_rank_of_a_server_reads_the_memory_of_its_own(launch, dense_model, monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # two ranks on a processor that is one node
    monkeypatch.setattr(server_process, "OWNED", {})  # a run's servers have several ranks on GPUs only
    served = launch(dense_model, start_timeout_s=600, **{"tp-size": 2})
    cases = {"tp2": (TP2, [0, 1]), "pp2, in turn": (PP2, [1, 0])}
    try:
        check(cases, *hand(served, cases, sglang_models.make_dense, tmp_path))
    finally:
        served.process.stop(at_once=True)
