"""A record: what a script measured, with its hour and machine, as JSON, and the same as a page to read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any


def here() -> dict[str, Any]:
    """What a record begins with."""
    return {"date": str(date.today()), "cpu": cpu_name(), "load_average": os.getloadavg()}


def cpu_name() -> str:
    """The processor's name as Linux has it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def write(out: Path, record: Mapping[str, Any], text: str) -> None:
    """`out` with the endings `.json` and `.md`."""
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
