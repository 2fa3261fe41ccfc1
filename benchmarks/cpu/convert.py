"""Rate and memory of `tools/convert_checkpoint.py`, beside `cp` of the same bytes on the same disk in the same run.

Weights are random, tensor by tensor of the exact shapes of a config.json; `--layers` makes a model fit the disk, which has to
hold it three times. With `--rounds` the least of several counts, of `cp` as of the tool: what else the machine does only takes
time. Memory: the largest of anonymous pages (what the program holds) and of resident ones (page cache of mapped files
included), sampled every 50 ms. Both ways are checked: the tensors that come back are compared bit for bit. With `--verify` the
tool reads source and output again and compares as well, within the seconds told.

Usage: convert.py [--model examples/models/Qwen3-4B-Base] [--layers 0] [--verify] [--rounds 1] [--folder FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"
MIB = 1024**2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--model", default="examples/models/Qwen3-4B-Base")
    arguments.add_argument("--layers", type=int, default=0, help="0: as config.json says")
    arguments.add_argument("--verify", action="store_true")
    arguments.add_argument("--rounds", type=int, default=1, help="by turns")
    arguments.add_argument("--folder", default=None, help="on the disk that is measured")
    arguments.add_argument("--out", default="benchmarks/records/convert")
    given = arguments.parse_args()
    verify = ["--verify"] * given.verify
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        place = Path(folder)
        facts = make(ROOT / given.model, given.layers, place / "model")
        rounds = []
        for _ in range(given.rounds):
            rounds.append(one_round(place, verify))
            facts["unequal tensors"] = unequal(place / "model", place / "back")
            shutil.rmtree(place / "back")
    facts |= {"verified": given.verify, "rounds": given.rounds}
    rows = {name: least([one[name] for one in rounds]) for name in rounds[0]}
    write(Path(given.out), Path(given.model).name, facts, rows)


def one_round(place: Path, verify: list[str]) -> dict[str, dict[str, float]]:
    """Both ways, `cp` before and after."""
    rows = {"cp": copied(place / "model", place / "copy")}
    shutil.rmtree(place / "copy")
    rows["start"] = measured(["--help"])
    rows["to megatron"] = measured([str(place / "model"), str(place / "there"), "--to", "megatron", *verify])
    rows["to hf"] = measured([str(place / "there"), str(place / "back"), "--to", "hf", *verify])
    shutil.rmtree(place / "there")
    rows["cp again"] = copied(place / "model", place / "copy")
    shutil.rmtree(place / "copy")
    return rows


def least(rows: list[dict[str, float]]) -> dict[str, float]:
    """Seconds and CPU-seconds at best, memory at worst."""
    return {key: (min if key in ("seconds", "cpu") else max)(row[key] for row in rows) for key in rows[0]}


def make(source: Path, layers: int, folder: Path) -> dict[str, Any]:
    """A Hugging Face folder of random bfloat16 weights."""
    from megatron_pz.platform.select import select_platform

    select_platform("cpu")
    import torch

    from megatron_pz.checkpoint.skeleton import skeleton
    from megatron_pz.checkpoint.tensor_file import TensorFile

    hf = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    if layers:
        hf["num_hidden_layers"] = layers
        hf.pop("layer_types", None)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf))
    generator = torch.Generator().manual_seed(1)
    specs = [
        (name, torch.bfloat16, shape)
        for one in skeleton(hf, 8).parameters
        for name, shape in zip(one.shard.hf_names, one.shard.hf_shapes(), strict=True)
    ]
    file = TensorFile(folder / "model.safetensors", specs)
    # Any bits but infinities and NaNs. Drawn once, begun at another place for each tensor: lots take longer than the rest.
    drawn = torch.randint(0, 2**14, (2**25 - 39,), dtype=torch.int16, generator=generator)
    for name, dtype, shape in specs:
        count = torch.Size(shape).numel()
        start = int(torch.randint(max(1, drawn.numel() - count), (), generator=generator))
        bits = drawn[start:] if count <= drawn.numel() else drawn.repeat(-(-count // drawn.numel()))
        bits = bits[:count]
        file.add(name, bits.view(dtype).reshape(shape))
    file.finish()
    sizes = [2 * torch.Size(shape).numel() for _, _, shape in specs]
    return {"layers": hf["num_hidden_layers"], "tensors": len(specs), "bytes": sum(sizes), "largest": max(sizes)}


def copied(source: Path, destination: Path) -> dict[str, float]:
    """`cp`, until the bytes are on disk, as the tool's are."""
    start, before = time.perf_counter(), spent()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    subprocess.run(["sync", "-f", str(destination)], check=True)
    return {"seconds": time.perf_counter() - start, "cpu": spent() - before}


def spent() -> float:
    """CPU-seconds of the processes that ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def measured(given: list[str]) -> dict[str, float]:
    start, before = time.perf_counter(), spent()
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *given],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    held = {"RssAnon": 0, "VmRSS": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for name in held:
            if found := re.search(rf"{name}:\s+(\d+) kB", status):
                held[name] = max(held[name], int(found[1]) * 1024)
        time.sleep(0.05)
    assert process.wait() == 0, given
    return {"seconds": time.perf_counter() - start, "cpu": spent() - before, **held}


def unequal(first: Path, second: Path) -> int:
    """Tensors that differ."""
    import torch

    from megatron_pz.checkpoint.hf_import import TensorReader

    a, b = TensorReader(first), TensorReader(second)
    assert a.names == b.names
    return sum(not torch.equal(a.read(name).view(torch.int16), b.read(name).view(torch.int16)) for name in a.names)


def write(out: Path, model: str, facts: dict[str, Any], rows: dict[str, Any]) -> None:
    start, copies = rows["start"], [rows["cp"], rows["cp again"]]
    cp = {key: min(one[key] for one in copies) for key in ("seconds", "cpu")}
    lines = [
        f"## {model}, {facts['layers']} layers",
        "",
        f"{date.today()}, {facts['bytes'] / 1e9:.2f} GB in {facts['tensors']} tensors of bfloat16, the largest "
        f"{facts['largest'] / MIB:.0f} MiB; {os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}; the least of "
        f"{facts['rounds']} rounds. Tensors that came back otherwise: {facts['unequal tensors']}. "
        f"{'The tool verified what it wrote (`--verify`), within its seconds. ' * facts['verified']}"
        f"Of the tool's seconds {start['seconds']:.1f} are its start (imports; `--help` alone), of its CPU-seconds "
        f"{start['cpu']:.1f}. Rates are over the better `cp`.",
        "",
        "| | seconds | CPU-seconds | GB/s | rate | without the start | by CPU-seconds, without | anonymous memory | resident |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if name == "start":
            continue
        memory = [f"{row[key] / MIB:.0f} MiB" if key in row else "" for key in ("RssAnon", "VmRSS")]
        rate = facts["bytes"] / row["seconds"] / 1e9
        later = {key: row[key] - start[key] * ("RssAnon" in row) for key in cp}
        lines.append(
            f"| {name} | {row['seconds']:.1f} | {row['cpu']:.1f} | {rate:.2f} | {cp['seconds'] / row['seconds']:.2f} | "
            f"{cp['seconds'] / later['seconds']:.2f} | {cp['cpu'] / later['cpu']:.2f} | {' | '.join(memory)} |"
        )
    record = out.with_suffix(".json")
    known = json.loads(record.read_text()) if record.exists() else {}
    known[f"{model}, {facts['layers']} layers{', verified' * facts['verified']}"] = {
        "facts": facts,
        "rows": rows,
        "markdown": lines,
    }
    record.write_text(json.dumps(known, indent=1) + "\n")
    text = ["# Conversion beside `cp`", ""]
    for one in known.values():
        text += [*one["markdown"], ""]
    out.with_suffix(".md").write_text("\n".join(text))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
