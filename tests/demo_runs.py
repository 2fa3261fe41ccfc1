"""Small real runs of the demo policy inside the test process: the program from its arguments to its exit code.

from demo_runs import run, tree
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_pz.corpus.leads import demo_split, read_leads
from megatron_pz.train.launch import main

ROOT = Path(__file__).parents[1]
TITLES = ("Leech", "Melanoma", "NBC", "Anthurium")


def _known_texts() -> tuple[str, ...]:
    """Texts that the demo policy was trained on, as `make demo-corpus` takes them out of their package."""
    seen, _ = demo_split(read_leads())
    texts = {paragraph.title: paragraph.text for paragraph in seen}
    return tuple(texts[title] for title in TITLES)


TEXT = _known_texts()
FLAGS: Mapping[str, object] = {
    "hf_model": ROOT / "examples" / "demo_policy",
    "template_dir": ROOT / "examples" / "templates" / "demo",
    "held_out_path": "",
    "paragraphs_per_step": 2,
    "n_masks_per_paragraph": 4,
    "n_predictions_per_mask": 4,
    "num_fixed_masks": 4,
    "eval_interval": 0,
    "save_interval": 0,
    "show_rollouts": 0,
    "tensorboard": False,
    "write_page": False,
    "export_hf": False,
}


def tiny_policy(folder: Path) -> Path:
    """A folder with the demo policy's tokenizer and a model of 130 thousand parameters, to be made with `init` random.

    Its checkpoints are of 2 MB instead of 50.
    """
    source = ROOT / "examples" / "demo_policy"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps(config | small), encoding="utf-8")
    return folder


def arguments(run_dir: Path, data_path: Path, **flags: object) -> list[str]:
    """The command line; a flag by its field's name, `config` for the TOML file."""
    given = {**FLAGS, "run_dir": run_dir, "data_path": data_path, **flags}
    config = given.pop("config", ROOT / "examples" / "demo.toml")
    found = [str(config)]
    for name, value in given.items():
        flag = name.replace("_", "-")
        found += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return found


def run(run_dir: Path, data_path: Path, **flags: object) -> int:
    """Exit code of the program, run in this process."""
    return main(arguments(run_dir, data_path, **flags))


def write_text(path: Path, texts: tuple[str, ...] = TEXT) -> Path:
    """A corpus."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def rows(run_dir: Path, file: str = "metrics.jsonl") -> list[dict[str, float]]:
    """Of a JSONL file of the run."""
    return [json.loads(line) for line in (run_dir / file).read_text(encoding="utf-8").splitlines()]


def tree(folder: Path) -> dict[str, str]:
    """Every file in `folder` with its SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checkpoints(run_dir: Path) -> list[str]:
    """Everything in the folder of checkpoints, leftovers too."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Within the block the kernel refuses to make any file longer: EFBIG, where a full disk has ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
