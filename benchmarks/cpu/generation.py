"""Sampled tokens a CPU-second: the embedded engine beside transformers' `generate`, same policy, prompts and lengths.

Both have the demo policy in float32 and one thread, in one process, by turns; every response has the same forced length
(no end token stops it), temperature 1, no top-k or top-p. `generate` gets all rows as one left-padded batch and repeats
each prompt for its group; the engine prefills a prompt once.

Usage: generation.py [--rounds 4] [--out benchmarks/records/generation]      (after `make demo-corpus`)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import records
import torch

torch.set_num_threads(1)

from megatron_pz.platform.select import select_platform  # noqa: E402

platform = select_platform("cpu")

from transformers import AutoModelForCausalLM  # noqa: E402

from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.config.load import load_config  # noqa: E402
from megatron_pz.corpus.reader import read_paragraphs  # noqa: E402
from megatron_pz.corpus.tokenizer import load_tokenizer  # noqa: E402
from megatron_pz.engine.base import converse  # noqa: E402
from megatron_pz.models.folder import read_hf_config, resolve_folder  # noqa: E402
from megatron_pz.train.decode import embedded_engine  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402
from megatron_pz.types import SamplingParams  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
GROUP = 8
CASES = ((8, 16), (64, 16), (8, 128))  # prompts, response tokens


def main() -> None:
    """Measure, print the table, write the records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/records/generation")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    config = load_config(["examples/demo.toml", "--max-running-requests", "512"])
    folder = resolve_folder(config.model.hf_model)
    tokenizer = load_tokenizer(folder)
    paragraphs, _ = read_paragraphs(config.corpus.data_path, skip_bad_lines=False)
    prompts = [tokenizer.encode(f"<gen>{paragraph.text}")[:256] for paragraph in paragraphs[: max(n for n, _ in CASES)]]
    parallel = init_parallel(config.parallel, platform, config.train.seed)
    chunks = build_model(read_hf_config(folder), config, platform, parallel)
    load_hf_weights(chunks, folder)
    engine = embedded_engine(chunks, config.engine)
    engine.load(chunks, 0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ours(count: int, length: int) -> int:
        async def play() -> int:
            asked = [
                engine.generate(ids, SamplingParams(length, seed=place * GROUP + copy))
                for place, ids in enumerate(prompts[:count])
                for copy in range(GROUP)
            ]
            return sum(len(completion.token_ids) for completion in await asyncio.gather(*asked))

        return converse(engine, play) or 0

    def theirs(count: int, length: int) -> int:
        rows = [ids for ids in prompts[:count] for _ in range(GROUP)]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
            )
        return int((out.shape[1] - longest) * out.shape[0])

    sides: dict[str, Callable[[int, int], int]] = {"megatron_pz": ours, "transformers": theirs}
    rates: dict[str, dict[str, list[float]]] = {}
    for count, length in CASES:
        name = f"{count} prompts x {GROUP}, {length} tokens"
        found: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(arguments.rounds + 1):
            for side, generate in sides.items():
                start = time.process_time()
                tokens = generate(count, length)
                spent = time.process_time() - start
                assert tokens == count * GROUP * length, f"{side} made {tokens} tokens"
                if number:  # the first warms up
                    found[side].append(tokens / spent)
        rates[name] = found
    shutdown()
    lines = ["| tokens a CPU-second | megatron_pz | transformers | ratio (least to most) |", "|---|---|---|---|"]
    for name, found in rates.items():
        ratio = [a / b for a, b in zip(found["megatron_pz"], found["transformers"], strict=True)]
        means = " | ".join(f"{statistics.fmean(found[side]):.0f}" for side in sides)
        lines.append(f"| {name} | {means} | **{statistics.fmean(ratio):.2f}** ({min(ratio):.2f} to {max(ratio):.2f}) |")
    table = "\n".join(lines) + "\n"
    versions = {package: version(package) for package in ("torch", "megatron-core", "transformers")}
    record = {
        **records.here(),
        "versions": versions,
        "prompt_tokens_mean": statistics.fmean(map(len, prompts)),
        "tokens_per_cpu_s": rates,
    }
    told = (
        f"{record['date']}, {record['cpu']}, one thread, float32; prompts of {record['prompt_tokens_mean']:.0f} tokens "
        "on average; " + ", ".join(f"{package} {number}" for package, number in versions.items())
    )
    text = f"# Generation beside transformers\n\n{told}.\n\n{table}"
    records.write(arguments.out, record, text)
    print("\n" + table)


if __name__ == "__main__":
    main()
