"""A language in which facts have two versions, and runs of the program on it: what the learning tests are made of.

The warm-up text tells each fact in either version, 40 : 60 and at random, so that supervision brings a policy to about
40 % on any question and no further. The game is played on text in which only the rarer version holds: a hidden word
follows from the words around it, and reinforcement has to find out which version that is.

    policy = warm_start(folder, seed)
    play(folder, "learned", policy, seed, steps=40)  ->  accuracy before and after
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
TEMPLATES = HERE.parent / "examples" / "templates" / "demo"

FACTS = [
    [tuple(versions.split("/")) for versions in line.split()]
    for line in """
    red/rusty fox/vixen mice/hens woods/dens
    white/pale bear/cub fish/seals snow/floes
    grey/dusky owl/owlet voles/moths barns/lofts
    green/olive frog/toad flies/gnats ponds/bogs
    black/dark crow/rook corn/worms fields/farms
    brown/tawny hare/rabbit clover/roots meadows/dunes
    pink/rosy swan/goose reeds/algae lakes/canals
    striped/banded bee/wasp nectar/jam hives/attics
    blue/navy whale/orca krill/squid oceans/fjords
    golden/sandy lion/puma zebra/deer plains/cliffs
    """.strip().splitlines()
]
SPECIAL = ["<pad>", "<eos>", "[mask]", "\\mask{", "\\boxed{", "}", "<gen>", "<pred>"]
OTHER_VERSION = 0.6  # share of the second version in the warm-up text

MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

COMMON = f"""
[task]
prompt_style = "plain"
template_dir = "{TEMPLATES}"
span_max_words = 1
n_masks_per_paragraph = 8
n_predictions_per_mask = 8
answer_weight = 10.0
prompt_weight = 1.0
[engine]
max_response_tokens = 8
[train]
max_tokens_per_micro_batch = 16384
[report]
tensorboard = false
write_page = false
"""


def paragraphs(seed: str, n: int, other_version: float) -> Iterator[str]:
    """`n` texts of two facts each; each word is of the second version with probability `other_version`."""
    rng = random.Random(seed)
    for _ in range(n):
        told = []
        for fact in rng.sample(FACTS, 2):
            colour, animal, food, home = (versions[rng.random() < other_version] for versions in fact)
            told.append(f"- {colour} {animal} : {food} , {home}")
        yield " ".join(told) + " ."


def write_language(folder: Path, seed: int) -> None:
    """`warm.jsonl`, `play.jsonl`, `ask.jsonl`, and in `blank/` tokenizer and config of a policy of 0.1 M parameters."""
    texts = {
        "warm": list(paragraphs(f"{seed} warm", 2000, OTHER_VERSION)),
        "play": list(paragraphs(f"{seed} play", 400, 0.0)),
        "ask": list(paragraphs(f"{seed} ask", 256, 0.0)),
    }
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts["warm"], trainer)
    blank = folder / "blank"
    blank.mkdir()
    tokenizer.save(str(blank / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (blank / "tokenizer_config.json").write_text(json.dumps(names))
    (blank / "config.json").write_text(json.dumps(MODEL | {"vocab_size": tokenizer.get_vocab_size()}))
    (folder / "common.toml").write_text(COMMON)


def run(folder: Path, name: str, *flags: str, program: tuple[str, ...] = ("-m", "megatron_pz"), timeout_s: int) -> Path:
    """Run the program on `common.toml` and `flags`; returns its run directory. Fails with what it wrote to stderr."""
    directory = folder / name
    command = [sys.executable, *program, str(folder / "common.toml"), "--run-dir", str(directory), *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return directory


def warm_start(folder: Path, seed: int) -> Path:
    """HF folder of a policy that `sft` has taught both formats and both versions of the facts."""
    write_language(folder, seed)
    flags = {
        "--task": "sft",
        "--hf-model": f"{folder}/blank",
        "--init": "random",
        "--data-path": f"{folder}/warm.jsonl",
        "--paragraphs-per-step": "32",
        "--train-iters": "600",
        "--lr": "5e-3",
        "--min-lr": "2.5e-4",
        "--lr-warmup-iters": "20",
        "--adam-beta2": "0.95",
        "--eval-interval": "0",
        "--save-interval": "0",
        "--seed": str(seed),
    }
    return run(folder, "warm", *(word for pair in flags.items() for word in pair), timeout_s=240) / "hf"


PLAIN = ("-m", "megatron_pz")
FLIPPED_ADVANTAGE = (str(HERE / "layouts" / "flipped_run.py"), "advantage")
FLIPPED_LOSS = (str(HERE / "layouts" / "flipped_run.py"), "loss")


def play(
    folder: Path,
    name: str,
    policy: Path,
    seed: int,
    *,
    steps: int,
    lr: float = 5e-4,
    program: tuple[str, ...] = PLAIN,
) -> Scores:
    """PretrainZero from `policy` on, and what it scored."""
    flags = {
        "--task": "pretrain_zero",
        "--hf-model": str(policy),
        "--data-path": f"{folder}/play.jsonl",
        "--held-out-path": f"{folder}/ask.jsonl",
        "--paragraphs-per-step": "8",
        "--train-iters": str(steps),
        "--lr": str(lr),
        "--min-lr": str(lr),
        "--lr-decay-style": "constant",
        "--weight-decay": "0",
        "--eval-interval": str(steps),
        "--num-fixed-masks": "256",
        "--save-interval": "0",
        "--seed": str(seed),
    }
    words = [word for pair in flags.items() for word in pair]
    directory = run(folder, name, *words, program=program, timeout_s=240)
    return _scores(directory / "metrics.jsonl")


@dataclass(frozen=True)
class Scores:
    """Accuracy before the first and after the last step, sampled: on the played texts; and after it on texts that are not."""

    before: float
    after: float
    unseen_after: float

    @property
    def rise(self) -> float:
        return self.after - self.before


def _scores(metrics: Path) -> Scores:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [row[key] for key in ("eval/fixed_masks/accuracy", "eval/held_out/accuracy") for row in rows if key in row]
    assert len(found) == 4, f"{len(found)} scores in {metrics}, wanted two of each set"
    return Scores(found[0], found[1], found[3])
