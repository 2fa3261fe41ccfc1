"""What the GPU benchmarks share: arguments, the card's ceilings measured in the same run, records, the table."""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "sglang", "liger-kernel", "trl")


def arguments(doc: str) -> argparse.ArgumentParser:
    """`--out DIR` and `--smoke`, to which a part may add its own."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-bench", help="folder of the records")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU too: does it run?")
    return parser


def device(smoke: bool) -> torch.device:
    """The GPU; in a smoke run without one, the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if smoke:
        return torch.device("cpu")
    raise SystemExit("needs a CUDA device; --smoke runs on a CPU")


def seconds(run: Callable[[], Any], repeats: int, on: torch.device) -> list[float]:
    """Wall time of each of `repeats` runs, the device waited for."""
    found = []
    for _ in range(repeats):
        wait(on)
        began = time.perf_counter()
        run()
        wait(on)
        found.append(time.perf_counter() - began)
    return found


def wait(on: torch.device) -> None:
    if on.type == "cuda":
        torch.cuda.synchronize()


def gemm_flops(on: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of the fastest of ten square products: what utilisation is measured against."""
    size = size if on.type == "cuda" else 256
    left, right = (torch.randn(size, size, device=on, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    return 2 * size**3 / min(seconds(lambda: torch.mm(left, right), 10, on))


def copy_rate(on: torch.device, num_bytes: int = 2**30) -> float:
    """Bytes a second that a copy on the device moves, counted once."""
    source = torch.empty(num_bytes if on.type == "cuda" else 2**22, dtype=torch.uint8, device=on)
    target = torch.empty_like(source)
    target.copy_(source)
    return source.numel() / min(seconds(lambda: target.copy_(source), 10, on))


@functools.cache
def unserved(python: str) -> str:
    """Why there can be no server of the interpreter `python` (empty: this one); empty where there can. It takes seconds, once."""
    absent = subprocess.run([python or sys.executable, "-c", "import sglang"], capture_output=True).returncode
    return "SGLang is not installed in --server-python" if absent else ""


def machine(on: torch.device, server_python: str = "") -> dict[str, Any]:
    """Card, versions (SGLang's of the interpreter that serves), commit, day."""
    found: dict[str, Any] = {"date": str(date.today()), "device": "cpu"}
    if on.type == "cuda":
        found["device"] = torch.cuda.get_device_name(on)
        found["memory_gib"] = round(torch.cuda.get_device_properties(on).total_memory / 2**30, 1)
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if server_python:
        ask = "from importlib.metadata import version; print(version('sglang'))"
        asked = subprocess.run([server_python, "-c", ask], capture_output=True, text=True)
        found["sglang"] = asked.stdout.strip() or None
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found | {"commit": done.stdout.strip() or None}


class Record:
    """`PART.json`, written anew with every row: a part whose time runs out has what it found by then.

    A row has `what`, `measured` (text), and where there is one `aim` and `met`, or `reason` where it could not be measured.
    """

    def __init__(self, out: Path, part: str, facts: dict[str, Any]) -> None:
        self._file, self.rows = out / f"{part}.json", list[dict[str, Any]]()
        self._facts: dict[str, Any] = {"part": part, "finished": False, **facts}
        out.mkdir(parents=True, exist_ok=True)
        self._save()

    def add(self, *rows: dict[str, Any]) -> None:
        """Keep them, and show them."""
        self.rows += rows
        self._save()
        print("\n".join(table(list(rows))[2:]), flush=True)

    def attempt(self, what: str, reason: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What `measure` finds; None, and a row that says why, where `reason` stands against it or it fails."""
        try:
            if not reason:
                return measure()
        except Exception as error:  # noqa: BLE001  # told in the table
            reason = f"{type(error).__name__}: {str(error)[:160]}"
        self.add({"what": what, "reason": reason})
        return None

    def finish(self, **facts: Any) -> None:
        """Nothing was left out for want of time."""
        self._facts |= {"finished": True, **facts}
        self._save()

    def _save(self) -> None:
        partial = self._file.with_name(f".{self._file.name}")
        partial.write_text(json.dumps({**self._facts, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")
        partial.rename(self._file)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| what | measured | aim | met |", "|---|---|---|---|"]
    for row in rows:
        measured = row.get("measured") or f"not run: {row['reason']}"
        met = {True: "yes", False: "no", None: ""}[row.get("met")]
        lines.append(f"| {row['what']} | {measured} | {row.get('aim', '')} | {met} |")
    return lines
