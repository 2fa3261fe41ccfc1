"""TRL's side of `grpo_vs_trl.py`: GRPOTrainer steps on a Qwen3 folder, phases in CPU-seconds, as one JSON line.

Usage: trl_worker.py MODEL_DIR STEPS PROMPTS GROUP PROMPT_TOKENS RESPONSE_TOKENS DTYPE MICRO_BATCHES

DTYPE bfloat16 is TRL's own mixed precision (`bf16=True`: float32 weights under autocast).
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time

import torch
from datasets import Dataset
from small_model import prompts as make_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)
model_dir = sys.argv[1]
steps, prompts, group, prompt_tokens, response_tokens = (int(value) for value in sys.argv[2:7])
is_half, micro_batches = sys.argv[7] == "bfloat16", int(sys.argv[8])
spent: dict = {"generate": 0.0, "step": []}
counts: dict = {}


class Timed(GRPOTrainer):
    """GRPOTrainer that notes the CPU-seconds of its generation call and of each step."""

    def _generate_single_turn(self, *args, **kwargs):
        start = time.process_time()
        out = super()._generate_single_turn(*args, **kwargs)
        spent["generate"] += time.process_time() - start
        counts["generated_tokens"] = sum(map(len, out[0]))
        return out


class Clock(TrainerCallback):
    """Notes the CPU-seconds of whole steps, the optimizer included."""

    def on_step_begin(self, *args, **kwargs):
        spent["generate"], self.start = 0.0, time.process_time()

    def on_step_end(self, *args, **kwargs):
        total = time.process_time() - self.start
        spent["step"].append((spent["generate"], total - spent["generate"]))


def reward(completion_ids, **kwargs):
    """A reward that differs inside a group, so that there is a gradient: the parity of the first token."""
    return [float(ids[0] % 2) for ids in completion_ids]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    rows = [{"prompt": tokenizer.decode(ids)} for ids in make_prompts(prompts * steps, prompt_tokens)]
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, per_device_train_batch_size=prompts * group // micro_batches,
            gradient_accumulation_steps=micro_batches, num_generations=group,
            max_completion_length=response_tokens, max_steps=steps, learning_rate=1e-4, beta=0.0, temperature=1.0,
            report_to=[], save_strategy="no", use_cpu=True, bf16=is_half, gradient_checkpointing=False, logging_steps=1000,
            generation_kwargs={"min_new_tokens": response_tokens}, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        Timed(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Clock()],
        ).train()
    kept = spent["step"][1:]  # the first step warms up
    print(json.dumps({
        "generate_cpu_s": sum(g for g, _ in kept) / len(kept),
        "train_cpu_s": sum(t for _, t in kept) / len(kept),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **counts,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
