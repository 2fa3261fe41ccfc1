"""All parts' records in DIR as one dated Markdown record, and its table on the console.

Usage: collect.py DIR PART...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import table


def main() -> None:
    out, rows = Path(sys.argv[1]), []
    facts: dict[str, Any] = {}
    for part in sys.argv[2:]:
        file = out / f"{part}.json"
        if not file.is_file():
            rows.append({"what": part, "reason": f"see {part}.log in {out}"})
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        facts |= {
            name: value for name, value in record.items() if isinstance(value, (str, float, int)) or value is None
        }
        rows += record["rows"]
        if not record["finished"]:
            rows.append({"what": f"{part}: the rest", "reason": f"it ended early; see {part}.log in {out}"})
    told = {name: value for name, value in facts.items() if name not in ("part", "finished")}
    head = f"{told.get('date')}, {told.get('device')}. " + ", ".join(
        f"{k} {v}" for k, v in told.items() if k not in ("date", "device")
    )
    text = "\n".join(["# GPU benchmarks", "", head + ".", "", *table(rows)]) + "\n"
    (out / f"{told.get('date')}-gpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
