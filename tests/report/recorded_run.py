"""A run directory such as a run leaves behind: the real game played against a policy that gets better by the step.

python tests/report/recorded_run.py FOLDER        # to look at its page
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from pathlib import Path

from builders import PLAIN, ByteTokenizer, TableEngine, paragraph

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.report.writers import RunWriter
from megatron_pz.tasks.journal_rows import journal_rows
from megatron_pz.tasks.registry import make_task

TEXTS = (
    "The tide rises and falls twice in most places because the Earth turns under two bulges of water, "
    "one towards the Moon and one away from it.",
    "Bread rises when yeast eats sugar and gives off carbon dioxide, which the dough holds back in small bubbles.",
    "A violin has four strings, tuned in fifths; the lowest is G. Its body is made of spruce and maple, "
    "and its bow is strung with horsehair.",
    "In 1905 Albert Einstein published four papers, one of them on the photoelectric effect and one on relativity.",
    "Das Wort Übermut enthält den Umlaut Ü. The German word is older than the English loan; "
    "naïve and café kept their accents too.",
    "Mount Kilimanjaro is a dormant volcano in Tanzania. It has three cones, Kibo, Mawenzi and Shira, "
    "and is the highest mountain in Africa.",
    "東京 is the capital of Japan 🗾, and about 14 million people live in the city; "
    "the Greater Tokyo Area holds 37 million.",
    "A page may quote <script>document.title = 'pwned'</script> and <img src=x onerror=alert(1)> & \"more\" "
    "without any of it being run.",
)


def record(run_dir: Path, num_steps: int = 40, *, texts: tuple[str, ...] = TEXTS, task: str = "pretrain_zero") -> Path:
    """Write a run of `num_steps` steps with all its files into `run_dir`; the same every time."""
    settings = TaskConfig(
        task=task, paragraphs_per_step=4, n_masks_per_paragraph=6, n_predictions_per_mask=6, prompt_style="plain"
    )
    tokenizer = ByteTokenizer()
    game = make_task(settings, EngineConfig(max_response_tokens=200), tokenizer, PLAIN)
    writer = RunWriter(run_dir)
    for step in range(num_steps + 1):
        skill = 0.25 + 0.5 * (1 - math.exp(-step / (num_steps / 3)))
        values: dict[str, float] = {}
        if step:
            chosen = [paragraph(texts[(step + i) % len(texts)], f"notes:{(step + i) % len(texts)}") for i in range(4)]
            engine = TableEngine(
                lambda prompt, params, skill=skill: _reply(prompt, params.seed, skill, texts), tokenizer
            )
            groups = game.groups(asyncio.run(game.play(chosen, engine, (7, step))), step)
            writer.rollouts(journal_rows(groups, step, weight_version=step - 1))
            values = game.health(groups) | _of_the_trainer(step, num_steps, random.Random(step))
        if step % 10 == 0:
            values |= _evaluate(writer, step, skill, texts)
        writer.metrics(step, values)
    writer.close()
    _settings(run_dir, num_steps, task)
    return run_dir


def _reply(prompt: str, seed: int, skill: float, texts: tuple[str, ...]) -> str:
    draw = random.Random(seed)
    if prompt.startswith("<gen>"):
        kind = draw.random()
        if kind > 0.65 + 0.25 * skill:
            return draw.choice(
                ["I would hide nothing here.", r"\mask{Zanzibar}", r"\mask{}", "\\mask{" + prompt[5:] + "}"]
            )
        tokens = prompt[5:].split()
        start = draw.randrange(len(tokens))
        span = " ".join(tokens[start : start + draw.choice((1, 1, 2))]).strip(".,;")
        thought = "This span can be worked out from what stands around it. " * draw.choice((0, 0, 0, 2))
        return thought + f"\\mask{{ {span}}}"
    masked = prompt[len("<pred>") :]
    before, _, behind = masked.partition("[mask]")
    text = next((t for t in texts if t.startswith(before) and t.endswith(behind.rpartition("[mask]")[2])), "")
    hidden = text[len(before) :][: len(text) - len(masked) + len("[mask]")] if masked.count("[mask]") == 1 else ""
    hard = 0.4 + 0.6 * random.Random(masked).random()
    if draw.random() < skill * hard and hidden:
        return f"\\boxed{{ {hidden}}}"
    return draw.choice([r"\boxed{ the}", r"\boxed{ water}", "no idea", r"\boxed{ Tanzania}"])


def _of_the_trainer(step: int, num_steps: int, draw: random.Random) -> dict[str, float]:
    noise = draw.gauss
    rollout, train = 1.9 + noise(0, 0.08), 2.7 + noise(0, 0.1)
    checkpoint = 0.4 if step % 10 == 1 and step > 1 else 0.0
    return {
        "loss": -0.02 + noise(0, 0.01),
        "grad_norm": 0.8 + 0.5 * math.exp(-step / 9) + abs(noise(0, 0.1)),
        "lr": 1e-4 * (1 - step / (2 * num_steps)),
        "entropy/mask": 2.4 - 1.0 * step / num_steps + noise(0, 0.05),
        "entropy/prediction": 1.6 - 0.9 * step / num_steps + noise(0, 0.05),
        "mismatch_kl": 3e-9 * math.exp(noise(0, 0.6)),
        "mismatch/max_abs": 4e-5 * math.exp(noise(0, 0.3)),
        "clip_fraction": max(0.0, 0.004 + noise(0, 0.002)),
        "ratio/mean": 1.0 + noise(0, 1e-4),
        "token_share/mask": 0.16 + noise(0, 0.01),
        "tokens/trained": 1900 + noise(0, 90),
        "tokens/packed": 21000 + noise(0, 600),
        "tokens/generated": 2600 + noise(0, 120),
        "num_paragraphs": 4.0,
        "epoch": step * 4 / len(TEXTS),
        "memory/rss_bytes": 1.1e9 + 2e6 * step,
        "time/rollout_s": rollout,
        "time/train_s": train,
        "time/batch_s": 0.03,
        "time/sync_s": 0.06,
        "time/checkpoint_s": checkpoint,
        "time/step_s": rollout + train + 0.1 + checkpoint,
    }


def _evaluate(writer: RunWriter, step: int, skill: float, texts: tuple[str, ...]) -> dict[str, float]:
    values = {}
    for name, share in (("fixed_masks", skill), ("held_out", 0.03)):
        rows = []
        for number, text in enumerate(texts):
            target = text.split()[1]
            answer = target if random.Random(f"{name}{number}").random() < share else "water"
            rows.append(
                {
                    "step": step,
                    "set": name,
                    "role": "prediction",
                    "prompt": "<pred>" + text.replace(target, "[mask]", 1),
                }
                | {"target": target, "answer": answer, "reward": float(answer == target), "valid": True}
            )
        writer.evaluation(rows)
        values[f"eval/{name}/accuracy"] = sum(row["reward"] for row in rows) / len(rows)
        values[f"eval/{name}/format_rate"] = 1.0
    return values


def _settings(run_dir: Path, num_steps: int, task: str) -> None:
    (run_dir / "config.toml").write_text(
        f"""[model]
hf_model = "examples/demo_policy"

[parallel]
tensor_model_parallel_size = 1

[corpus]
data_path = "notes.jsonl"

[task]
task = "{task}"
paragraphs_per_step = 4
n_masks_per_paragraph = 6
n_predictions_per_mask = 6

[train]
train_iters = {num_steps}
seed = 7
lr = 1e-4
""",
        encoding="utf-8",
    )
    facts = {
        "commit": "0123abc",
        "world_size": 1,
        "versions": {"torch": "2.13.0", "megatron-core": "0.16.1"},
        "attribution": "Notes <made up> for a test & by nobody",
    }
    (run_dir / "run.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
