"""The main job with experts: a real server's routing replayed, step after step, importance weighed."""

import json
import shutil

import pytest
import torch
from demo_runs import ROOT, TEXT, rows, run, write_text
from metric_ranges import out_of_range

from megatron_pz.report.metrics import WHEN

pytestmark = pytest.mark.slow  # minutes; tests/sglang has shorter ones of the same parts

POLICY = ROOT / "examples" / "demo_policy"
NUM_EXPERTS = 4


def make_experts_of(policy, folder):
    """The dense policy with nearly equal copies of each MLP for experts, so that it can play.

    SGLang's Qwen3-MoE has experts in every layer and a head of its own, whatever config.json says.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(policy, folder)
    config = json.loads((folder / "config.json").read_text())
    experts = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config | experts))
    generator = torch.manual_seed(0)
    made = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".mlp." not in name:
            made[name] = tensor
            continue
        for expert in range(NUM_EXPERTS):
            noise = 0.02 * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
            made[name.replace(".mlp.", f".mlp.experts.{expert}.")] = (tensor.float() + noise).to(tensor.dtype)
        if "gate_proj" in name:
            router = 0.1 * torch.randn(NUM_EXPERTS, config["hidden_size"], generator=generator)
            made[name.replace("gate_proj", "gate")] = router.to(tensor.dtype)
    made["lm_head.weight"] = made["model.embed_tokens.weight"].clone()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def place(launch, tmp_path_factory):
    """Flags of a run that attaches to a server of a policy with experts, and where to put it."""
    folder = tmp_path_factory.mktemp("jobs")
    policy = make_experts_of(POLICY, folder / "policy")
    served = launch(policy, **{"context-length": 512, "enable-return-routed-experts": True})
    (folder / "key").write_text(served.api_key)
    flags = {"engine": "sglang", "server_urls": served.url, "api_key_file": folder / "key", "hf_model": policy}
    flags |= {"data_path": write_text(folder / "text.jsonl", TEXT * 8), "routing_replay": True, "verify_weights": True}
    yield folder, flags
    served.process.stop(at_once=True)


def test_every_trained_token_goes_to_the_experts_of_the_server_and_both_agree_in_every_step(place):
    folder, flags = place
    more = {"n_masks_per_paragraph": 6, "n_predictions_per_mask": 8, "importance_sampling": "truncated"}
    assert run(folder / "run", train_iters=3, lr=1e-3, **flags, **more) == 0
    found = rows(folder / "run")
    learned = [row for row in found if "grad_norm" in row]  # in others no group had anything to teach
    assert len(learned) >= 2
    print("\nlargest differences", [f"{row['mismatch/max_abs']:.1e}" for row in learned])
    for row in learned:
        assert out_of_range(row) == []
        assert row["mismatch/replayed_share"] == 1
        assert row["mismatch/max_abs"] < 1e-4
        assert (row["mismatch/clipped_share"], row["ratio/mean"]) == (0, 1)
    assert {name for name, condition in WHEN.items() if "routing_replay" in condition} <= set(learned[0])
