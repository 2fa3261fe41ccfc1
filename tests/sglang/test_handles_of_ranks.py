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


@pytest.fixture(scope="module")
def handed(request, tmp_path_factory):
    """Which server, what the worker found by case, and the folder of each case's weights: each case has weights of its own."""
    served, cases = request.getfixturevalue(request.param), CASES[request.param]
    make = sglang_models.make_dense if request.param == "server" else sglang_models.make_moe
    place = tmp_path_factory.mktemp("handles")
    folders = {name: make(place / str(seed), seed=seed) for seed, name in enumerate(cases, 30)}
    job = [
        {"name": name, "folder": str(folders[name]), "url": served.url, "layout": layout, "owners": owners}
        for name, (layout, owners) in cases.items()
    ]
    (place / "job.json").write_text(json.dumps({"cases": job, "prompts": PROMPTS}))
    paths = os.pathsep.join([str(WORKER.parents[2]), str(WORKER.parents[1])])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    try:
        with (place / "log").open(
            "w"
        ) as log:  # no pipe: torch's keeper of shared memory outlives the ranks, and holds it
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
        yield request.param, json.loads((place / "answers.json").read_text()), folders
    finally:
        served.restore()


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


@pytest.mark.parametrize("handed", CASES, indirect=True)
def test_a_server_has_the_whole_model_from_either_ranks_memory(handed):
    server, found, folders = handed
    assert list(found) == list(CASES[server])
    for version, (case, about) in enumerate(found.items(), 1):
        difference = largest_difference(about["answers"], folders[case])
        print(f"\n{case}: largest difference {difference:.1e}, {about['bytes']} bytes")
        assert difference < TOLERANCE, case
        assert {stamp for answer in about["answers"] for stamp in answer["versions"]} == {version}
        source = sum(file.stat().st_size for file in folders[case].glob("*.safetensors"))
        assert 0.98 * source < about["bytes"] <= source  # each tensor once; the file has a header too
        assert about["largest_bucket"] <= max(BUCKET_BYTES, EMBEDDING_BYTES)
    first, last = folders[next(iter(found))], about["answers"]
    assert largest_difference(last, first) > 0.1  # so the comparison can fail
