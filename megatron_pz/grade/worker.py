"""The process that compares answers for a `judge.Judge`: a question a line on stdin, a verdict a line on stdout.

It may be ended at any time. Memory is bounded, so that a formula that grows without end ends here and nowhere else.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Mapping

from megatron_pz.grade import math_verify_rule, qwen

MEMORY_BYTES = 4 * 1024**3
RULES: Mapping[str, Callable[[str, str], bool]] = {"qwen": qwen.equal, "math_verify": math_verify_rule.equal}


def main() -> None:
    """Answer until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)  # what is no formula is no news
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # a library that prints must not answer for us
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            said: dict[str, bool | str] = {"right": RULES[asked["rule"]](asked["answer"], asked["target"])}
        except Exception as error:  # noqa: BLE001 - told to the judge, which counts it
            said = {"fault": f"{type(error).__name__}: {error}"[:300]}
        out.write(json.dumps(said) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
