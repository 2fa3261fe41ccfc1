"""Make the demo policy again: `examples/demo_policy`, a small Qwen3-architecture model with a tokenizer of its own.

    python tools/make_demo_policy.py                            # all of it; half an hour of one core
    python tools/make_demo_policy.py blank [FOLDER]             # 1. tokenizer and config.json, no weights
                                                                # 2. runs continue_pt, sft and sft_again (.toml)
    python tools/make_demo_policy.py commit HF_FOLDER [FOLDER]  # 3. weights of a finished run, as bfloat16
    python tools/make_demo_policy.py measure seen|held_out      # 4. how it plays before any reinforcement

It wants the texts of `make demo-corpus` in `.cache/demo`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_pz.corpus.leads import demo_split, read_leads
from megatron_pz.errors import MegatronPZError

BLANK = Path(".cache/demo_policy/blank")
HOME = Path("examples/demo_policy")
PAD, EOS = "<pad>", "<eos>"
SPECIAL = (PAD, EOS, "[mask]", "\\mask{", "\\boxed{", "}", "<gen>", "<pred>")
VOCAB_SIZE = 4000
MAX_BYTES = 12_000_000
STAGES = ("continue_pt", "sft", "sft_again")
RECORD = Path("benchmarks/records/demo_policy.json")
MEASURED = ("eval/", "mask/", "prediction/", "groups/", "reward/")

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_cache": True,
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": SPECIAL.index(EOS),
    "pad_token_id": SPECIAL.index(PAD),
    "dtype": "bfloat16",
}


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    r"""A byte-level BPE whose first ids are `SPECIAL`, so that `\mask{`, `}` and the like are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_blank(folder: Path, texts: Iterable[str], config: dict[str, Any] = CONFIG) -> None:
    """A Hugging Face folder without weights, for `model.init = "random"`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, config["vocab_size"])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", config | {"vocab_size": tokenizer.get_vocab_size()})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        },
    )
    _write_json(
        folder / "generation_config.json",
        {"eos_token_id": SPECIAL.index(EOS), "pad_token_id": SPECIAL.index(PAD), "do_sample": True, "temperature": 1.0},
    )


def commit(source: Path, folder: Path) -> int:
    """Weights of the export `source` as bfloat16 beside the tokenizer in `folder`; returns their bytes.

    Raises:
        ValueError: they are over `MAX_BYTES`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(weights.items())}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if num_bytes > MAX_BYTES:
        raise ValueError(f"{num_bytes} bytes of weights in {source}; at most {MAX_BYTES} are committed")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", config | {"dtype": "bfloat16"})
    part = folder / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.chmod(0o644)  # safetensors writes for the owner alone
    part.replace(folder / "model.safetensors")
    return num_bytes


def train(stage: str) -> float:
    """Run `examples/demo_policy/<stage>.toml` in a process of its own; returns its minutes.

    Raises:
        subprocess.CalledProcessError: it failed, and said why.
    """
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "megatron_pz", str(HOME / f"{stage}.toml")], check=True)
    return (time.monotonic() - start) / 60


def measure(texts: str) -> dict[str, float]:
    """One round of the game with the learning rate at 0: what a run from the committed policy begins with.

    Args:
        texts: `seen` or `held_out`.
    """
    run_dir = Path("runs/demo_policy") / f"measure_{texts}"
    shutil.rmtree(run_dir, ignore_errors=True)
    flags = ["--data-path", f".cache/demo/{texts}.jsonl", "--run-dir", str(run_dir)]
    subprocess.run([sys.executable, "-m", "megatron_pz", str(HOME / "measure.toml"), *flags], check=True)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    merged: dict[str, float] = {name: value for row in rows for name, value in row.items()}
    return {name: merged[name] for name in sorted(merged) if name.startswith(MEASURED)}


def make() -> None:
    """All stages, the committed folder and the record, from nothing."""
    blank(BLANK)
    minutes = {stage: round(train(stage), 1) for stage in STAGES}
    num_bytes = commit(Path("runs/demo_policy") / STAGES[-1] / "hf", HOME)
    scores = {texts: measure(texts) for texts in ("seen", "held_out")}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    _write_json(RECORD, {"bytes": num_bytes, "minutes": minutes, **scores})
    sys.stdout.write(f"demo policy: {num_bytes} bytes in {HOME}; record in {RECORD}\n")


def blank(folder: Path) -> None:
    """`write_blank` with a tokenizer learnt on all leads but the held-out ones."""
    leads = read_leads()
    hidden = {paragraph.id for paragraph in demo_split(leads)[1]}
    write_blank(folder, (lead.text for lead in leads if lead.id not in hidden))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    try:
        match list(argv):
            case []:
                make()
            case ["blank", *rest]:
                blank(Path(*rest) if rest else BLANK)
            case ["commit", source, *rest]:
                commit(Path(source), Path(*rest) if rest else HOME)
            case ["measure", texts]:
                sys.stdout.write(json.dumps(measure(texts), indent=2) + "\n")
            case _:
                sys.stderr.write(f"{__doc__}\n")
                return 2
    except (MegatronPZError, OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"demo policy: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
