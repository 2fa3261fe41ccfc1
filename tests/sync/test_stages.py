"""Four ranks: the first ranks of the pipeline stages together hand over the whole model (sync/collective.py, export.py)."""

import json
from pathlib import Path

import hf_models
import pytest
import torch
from programs import on_ranks
from safetensors.torch import load_file

from megatron_pz.sync.digests import server_digests

WORKER = Path(__file__).parents[1] / "layouts" / "sync_worker.py"
CASES = {
    "qwen3 tp2 pp2": "qwen3",
    "qwen3 untied dp2 pp2": "qwen3 untied",
    "qwen3_moe tp2 ep2 pp2": "qwen3_moe",
    "qwen3_moe mixed ep2 pp2": "qwen3_moe mixed",
    "smollm3 cp2 vpp2": "smollm3",
    "qwen3_moe tp2 sp etp2 ep2": "qwen3_moe",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    for name in set(CASES.values()):
        hf_models.make(name, folder / name)
    on_ranks(4, WORKER, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_stages_hand_over_each_tensor_once_and_bit_for_bit(folder, case):
    found = json.loads((folder / "report.json").read_text())[case]
    source = hf_models.tensors(folder / CASES[case])
    stages = [load_file(folder / f"{case}.{index}.safetensors") for index in range(1 + ("pp2" in case))]
    assert len(found["speakers"]) == len(stages) and found["speakers"][0] == 0
    names = [name for stage in stages for name in stage]
    assert len(set(names)) == len(names)
    together = {name: tensor for stage in stages for name, tensor in stage.items()}
    assert together.keys() == source.keys()
    assert [name for name in source if not torch.equal(source[name], together[name])] == []
    assert found["digests"] == server_digests(source.items(), torch.float32)
