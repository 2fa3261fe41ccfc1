"""Models of `transformers` in 16 layouts of two ranks: same logits and log-probs, and the same folder back.

The folder comes back by the layout's own export, and from the checkpoint that the layout saves; the layout has the same
parameters from the folder and from its conversion (checkpoint/convert.py).
"""

import json
from pathlib import Path

import hf_models
import pytest
import torch
from programs import on_ranks

from megatron_pz.platform.select import select_platform

WORKER = Path(__file__).parents[1] / "layouts" / "parity_worker.py"
TOLERANCE = 1e-4  # of logits with standard deviation 1.5; 6e-6 is seen
CASES = [
    *("qwen3 dp2", "qwen3 tp2", "qwen3 tp2 sp", "qwen3 pp2", "qwen3 untied pp2", "llama tp2"),
    *("smollm3 tp2", "smollm3 pp2", "qwen3_moe tp2", "qwen3_moe ep2", "qwen3_moe tp2 ep2"),
    *("qwen3_moe mixed ep2", "qwen3_moe mixed pp2", "qwen3_moe mixed cp2", "smollm3 cp2", "smollm3 vpp2"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    select_platform("cpu")
    from megatron_pz.checkpoint import convert

    expected = {}
    for name in hf_models.MODELS:
        hf_models.make(name, folder / name)
        expected[name] = hf_models.expected_logits(folder / name)
        convert.to_megatron(folder / name, folder / f"{name}.megatron", max_file_bytes=100_000)
    torch.save(expected, folder / "logits.pt")
    on_ranks(2, WORKER, folder)
    found = json.loads((folder / "report.json").read_text())
    assert sorted(found) == sorted(CASES)
    for case in found:
        name = max((name for name in hf_models.MODELS if case.startswith(name)), key=len)
        again = folder / f"{case}.hf"
        convert.to_hf(folder / f"{case}.saved", again, folder / name, max_file_bytes=100_000)
        before, after = hf_models.tensors(folder / name), hf_models.tensors(again)
        found[case]["from its checkpoint"] = [
            name for name in before.keys() | after.keys() if not torch.equal(before[name], after[name])
        ]
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_layout_answers_as_transformers_and_exports_the_same_bits(report, case):
    print(case, report[case])
    assert report[case]["logits"] < TOLERANCE
    assert report[case]["log_probs"] < TOLERANCE
    assert report[case]["bitwise"] == []
    assert report[case]["loaded"] == []
    assert report[case]["from its checkpoint"] == []
