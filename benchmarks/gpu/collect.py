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
        files = sorted(out.glob(f"{part}*.json"))
        if not files:
            rows.append({"what": part, "reason": f"see {part}.log in {out}"})
        for file in files:
            record = json.loads(file.read_text(encoding="utf-8"))
            facts |= {
                name: value for name, value in record.items() if isinstance(value, (str, float, int)) or value is None
            }
            found = record.get("rows")
            rows += found if isinstance(found, list) else [{"what": file.stem, "measured": f"see {file.name}"}]
    told = {name: value for name, value in facts.items() if name not in ("part", "rows")}
    head = f"{told.get('date')}, {told.get('device')}. " + ", ".join(
        f"{k} {v}" for k, v in told.items() if k not in ("date", "device")
    )
    text = "\n".join(["# GPU benchmarks", "", head + ".", "", *table(rows)]) + "\n"
    (out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
