"""What do the metrics of a healthy run look like? Makes the record that docs/metrics.md shows and tests/report/test_alarms.py reads.

.venv/bin/python -m megatron_pz examples/demo.toml --run-dir runs/healthy --probe-shuffled
.venv/bin/python benchmarks/cpu/healthy_demo.py runs/healthy

Writes into benchmarks/records: `healthy_demo.jsonl` (the run's metrics.jsonl without seconds and bytes), two plots, and
`healthy_demo.md` with what was run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

from megatron_pz.report.figure import draw_metrics
from megatron_pz.report.jsonl import METRICS_FILE, read_rows, to_line
from megatron_pz.report.reference import HEALTHY

RECORDS = Path(__file__).parents[1] / "records"
PLOTS = {
    "game": (
        *("mask/valid_rate", "mask/distinct_share", "mask/lottery_share", "groups/kept_share/prediction"),
        *("groups/one_right_share", "mask/visible_share", "eval/fixed_masks/accuracy", "eval/shuffled/accuracy"),
    ),
    "roles": (
        *("entropy/mask", "entropy/prediction", "token_share/mask", "grad_share/mask"),
        *("groups/duplicate_share/mask", "groups/duplicate_share/prediction"),
    ),
}


def main(run_dir: Path) -> None:
    rows = [
        {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))}
        for row in read_rows(run_dir / METRICS_FILE)
    ]
    (RECORDS / "healthy_demo.jsonl").write_text("".join(map(to_line, rows)), encoding="utf-8")
    for name, metrics in PLOTS.items():
        draw_metrics(rows, metrics, RECORDS / f"healthy_demo_{name}.svg")
    (RECORDS / "healthy_demo.md").write_text(_page(rows, run_dir), encoding="utf-8")


def _page(rows: list[dict[str, float]], run_dir: Path) -> str:
    facts = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# The metrics of a healthy run",
        "",
        f"`examples/demo.toml` with `--probe-shuffled`, seed 1234, {rows[-1]['step']} steps, one CPU thread;",
        f"Python {facts['python']}, {versions}.",
        "Made by `benchmarks/cpu/healthy_demo.py` (the two commands are in it). `healthy_demo.jsonl` is the run's `metrics.jsonl`",
        "without seconds and bytes. No alarm sounds at any step (`tests/report/test_alarms.py`).",
        "",
        "| metric | first ten steps | last ten steps | least | most |",
        "|---|---|---|---|---|",
    ]
    for name, *_ in HEALTHY:
        values = [row[name] for row in rows if name in row]
        numbers = (fmean(values[:10]), fmean(values[-10:]), min(values), max(values))
        lines.append(f"| `{name}` | {' | '.join(f'{number:.3g}' for number in numbers)} |")
    for name in ("fixed_masks", "held_out", "shuffled"):
        scores = [f"{row[f'eval/{name}/accuracy']:.1%}" for row in rows if f"eval/{name}/accuracy" in row]
        lines += ["", f"`eval/{name}/accuracy` every ten steps: {', '.join(scores)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
