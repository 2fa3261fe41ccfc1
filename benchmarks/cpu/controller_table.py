"""The tables of controller.py's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Case = Mapping[str, Any]


def tabulated(found: Mapping[str, Case]) -> str:
    """CPU-ms a rollout by stage, a column a case."""
    each = list(found.values())
    stages = list(each[-1]["stages"])
    table = _head("CPU-ms a rollout", found)
    table += _line("rollouts", [f"{one['rollouts']}" for one in each])
    table += _line("mean tokens of a response", [f"{one['tokens'] / one['rollouts']:.0f}" for one in each])
    table += _line("servers, requests under way", [f"{one['num_servers']}, {one['at_once']}" for one in each])
    for stage in stages:
        table += _line(stage, [_ms(one["stages"].get(stage, {"cpu_s": 0})["cpu_s"], one) for one in each])
        if stage == "play":
            for thread in ("server talk", "completion journal", "MainThread"):
                seconds = [one["stages"][stage].get(f"cpu_s of {thread}", 0.0) for one in each]
                table += _line(
                    f"- of these, thread {thread!r}", [_ms(s, one) for s, one in zip(seconds, each, strict=True)]
                )
    table += _line("**all**", [f"**{_ms(one['cpu_s'], one)}**" for one in each])
    table += _line("rollouts a second at most", [f"{one['rollouts_a_second']:.0f}" for one in each])
    table += _line("tokens a second at most", [f"{one['tokens'] / one['cpu_s']:.0f}" for one in each])
    play = [one["stages"]["play"] for one in each]
    table += _line(
        "requests a second, seen", [f"{one['rollouts'] / p['wall_s']:.0f}" for one, p in zip(each, play, strict=True)]
    )
    table += _line(
        "share of samples that are trained", [f"{one['trained_samples'] / one['rollouts']:.2f}" for one in each]
    )
    for title, name in (("memory", "rss"), ("journal", "journal"), ("rollouts.jsonl", "rollouts"), ("sent", "sent")):
        values = [
            f"{one[f'{name}_bytes' if name != 'sent' else 'sent_bytes'] / one['rollouts'] / 1e3:.1f}" for one in each
        ]
        table += _line(f"{title} a rollout, kB", values)
    return table + _line("memory, peak, GB", [f"{one['peak_bytes'] / 1e9:.2f}" for one in each])


def parts_of(found: Mapping[str, Case]) -> str:
    """CPU-ms a rollout by what it is spent on."""
    each = list(found.values())
    names = sorted({part for one in each for part in one["parts"]}, key=lambda part: -_seconds(each[-1], part))
    table = _head("CPU-ms a rollout", found)
    for name in names:
        table += _line(name, [_ms(_seconds(one, name), one) for one in each])
    rest = [one["cpu_s"] - sum(part["cpu_s"] for part in one["parts"].values()) for one in each]
    return table + _line(
        "the rest: asyncio, aiohttp, what lies between", [_ms(s, one) for s, one in zip(rest, each, strict=True)]
    )


def ratios(sides: Mapping[str, Sequence[Case]], beside: Mapping[str, Sequence[Case]]) -> str:
    """This package over the one beside it, by case: CPU-seconds, those of play, memory."""
    table = (
        "| this over the other | CPU-s a rollout | rollouts a second at most | memory a rollout |\n|---|---|---|---|\n"
    )
    for name, ours in sides.items():
        theirs = beside[name]
        cpu = [a["cpu_s"] / b["cpu_s"] * b["rollouts"] / a["rollouts"] for a, b in zip(ours, theirs, strict=True)]
        memory = [
            a["rss_bytes"] / b["rss_bytes"] * b["rollouts"] / a["rollouts"] for a, b in zip(ours, theirs, strict=True)
        ]
        rate = [
            f"{b['rollouts_a_second']:.0f} to {a['rollouts_a_second']:.0f}" for a, b in zip(ours, theirs, strict=True)
        ]
        table += f"| {name} | {_spread(cpu)} | {'; '.join(rate)} | {_spread(memory)} |\n"
    return table


def _head(title: str, found: Mapping[str, Case]) -> str:
    return f"| {title} | " + " | ".join(found) + " |\n|---|" + "---|" * len(found) + "\n"


def _line(title: str, values: Sequence[str]) -> str:
    return f"| {title} | " + " | ".join(values) + " |\n"


def _ms(seconds: float, one: Case) -> str:
    return f"{1e3 * seconds / one['rollouts']:.3f}"


def _seconds(one: Case, part: str) -> float:
    return float(one["parts"].get(part, {"cpu_s": 0.0})["cpu_s"])


def _spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"
