"""Gains question by question between the runs of `tools/compare.py`, after a number of updates: all words, function words, other words.

What `benchmarks/records/compare_smollm2.md` says beside the table at equal tokens. Scores of a question are means over seeds, questions
are those put in the same words (`--own-start`: the variant against its own start, on its own questions); 95% intervals over questions.

Usage: study_tables.py DIR [--updates 20] [--reference control] [--own-start]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

from megatron_pz.game.stop_words import is_stop_words
from megatron_pz.report.comparison import half_interval
from megatron_pz.report.jsonl import EVAL_FILE, read_rows

Scores = dict[tuple[str, str, str], float]  # mask_id, prompt, target


def scores(variant: Path, questions: str, updates: int) -> Scores:
    """Of the last evaluation within `updates` of each seed."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for file in sorted(variant.glob(f"seed_*/{EVAL_FILE}")):
        rows = [row for row in read_rows(file) if row["set"] == questions and row["step"] <= updates]
        last = max(row["step"] for row in rows)
        for row in rows:
            if row["step"] == last:
                found.setdefault((row["mask_id"], row["prompt"], row["target"]), []).append(float(row["reward"]))
    return {question: fmean(values) for question, values in found.items()}


def gain(of: Scores, over: Scores, wanted: bool | None = None) -> str:
    """Over the questions that both were asked; `wanted`: those of function words, or of others."""
    alike = [key for key in of.keys() & over.keys() if wanted is None or is_stop_words(key[2]) == wanted]
    differences = [of[key] - over[key] for key in alike]
    return f"{100 * fmean(differences):+.1f} ± {100 * half_interval(differences):.1f} ({len(alike)})" if alike else ""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("folder", type=Path, help="the --out of tools/compare.py")
    arguments.add_argument("--updates", type=int, default=20)
    arguments.add_argument("--reference", default="control")
    arguments.add_argument("--own-start", action="store_true")
    given = arguments.parse_args()
    variants = json.loads((given.folder / "comparison.json").read_text())["fixed_masks"]["rows"]
    against = "their own start" if given.own_start else given.reference
    for questions in ("fixed_masks", "held_out"):
        lines = [
            f"{questions}, at most {given.updates} updates, over {against}; in brackets: questions",
            "",
            "| variant | score | all | function words | other words |",
            "|---|---|---|---|---|",
        ]
        for name in [row["variant"] for row in variants]:
            of = scores(given.folder / name, questions, given.updates)
            over = scores(
                given.folder / (name if given.own_start else given.reference),
                questions,
                0 if given.own_start else given.updates,
            )
            gains = " | ".join(gain(of, over, wanted) for wanted in (None, True, False))
            lines.append(f"| {name} | {fmean(of.values()):.1%} | {gains} |")
        sys.stdout.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
