"""`make demo-smollm2`: its settings and prompts hang together, and (slow, where `make smollm2` has run) it learns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_pz.config.load import load_config
from megatron_pz.config.rules import validate
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.game.masking import MaskRules
from megatron_pz.game.prompts import Templates
from megatron_pz.types import Role, Tokenizer

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "examples" / "demo_smollm2.toml"
MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
SHOT = re.compile(r"^Text: (.*)\n(?:Mask: \\mask|Missing: \\boxed)\{(.*)\}$", re.MULTILINE)


@pytest.fixture(scope="module")
def templates() -> Templates:
    return Templates.load(ROOT / "examples" / "templates" / "smollm2", "plain")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(MODEL if MODEL.exists() else ROOT / "examples" / "demo_policy")


def test_the_settings_are_valid() -> None:
    config = load_config([str(SETTINGS)])
    validate(config, world_size=1)
    assert MaskRules.of(config.task).validity == "one_mask"
    assert (config.engine.temperature, config.evaluate.eval_temperature) == (0.7, 0.7)


def test_the_worked_examples_of_both_prompts_are_the_same_texts_with_one_place_hidden(templates: Templates) -> None:
    named, hidden = SHOT.findall(templates.mask.text), SHOT.findall(templates.prediction.text)
    assert len(named) == len(hidden) == 3
    for (text, span), (masked, answer) in zip(named, hidden, strict=True):
        assert span == answer
        assert masked.count("[mask]") == 1
        assert masked.replace("[mask]", answer.strip()) == text
        assert answer.strip() in masked  # it stands there once more


def test_an_answer_goes_on_where_the_prompt_ends(templates: Templates, tokenizer: Tokenizer) -> None:
    """The tokens of an example are those of a prompt's end and a response: the model sees what it shall write."""
    for role, opening in ((Role.GENERATOR, r"\mask{"), (Role.PREDICTOR, r"\boxed{")):
        template = templates.of(role)
        assert template.answer_prefix == opening
        prompt = template.fill("Ice floats.")
        ids, response = templates.ids(prompt, tokenizer), tokenizer.encode(" ice}")
        assert tokenizer.encode(f"{prompt} ice}}") == [*ids, *response]
        assert response[-1] in templates.stop_token_ids(role, tokenizer)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL} is missing; make smollm2 writes it")
def test_three_updates_on_smollm2_leave_a_model_that_transformers_loads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    flags = {
        "--train-iters": 3,
        "--paragraphs-per-step": 2,
        "--num-fixed-masks": 8,
        "--run-dir": tmp_path,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_pz", str(SETTINGS), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning on the screen
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    updates = [step for step in steps if step.get("num_surviving_groups")]
    print(*({key: round(value, 4) for key, value in step.items()} for step in steps), sep="\n")
    assert len(updates) == 3
    assert all(step["mask/valid_rate"] > 0.2 for step in updates)  # 0.6 to 0.8
    assert sum(step["reward/prediction/mean"] for step in updates) > 0.1  # 0.2 to 0.5 each
    assert all(0 < step["grad_norm"] < 1000 for step in updates)
    assert all(step["mismatch_kl"] < 0.05 for step in updates)  # bfloat16: 0.003 to 0.01
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    first = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).state_dict()
    assert exported.keys() == first.keys()
    moved = max(float((exported[name] - first[name].bfloat16().float()).abs().max()) for name in first)
    assert 0 < moved < 0.1
