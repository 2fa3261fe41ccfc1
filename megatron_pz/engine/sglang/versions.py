"""Which SGLang servers are understood: by the version's numbers, before anything is asked of them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

from megatron_pz.errors import EngineError

SUPPORTED = (">=0.5.21", "<0.6")
"""0.5.21 brought sessions of weight updates (begin, end); 0.5.23 is the one that tests run."""

_FROM, _BELOW = (0, 5, 21), (0, 6)
_ASK = "import importlib.metadata as m; print(m.version('sglang'))"


def check_version(version: str, where: str) -> None:
    """Refuse a server whose `version` is not supported.

    >>> check_version("0.5.23", "http://node1:30000")

    Raises:
        EngineError: it is older, newer, or no version at all.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", re.match(r"[\d.]*", version)[0]))  # type: ignore[index]
    if not _FROM <= numbers < _BELOW:
        raise EngineError(
            f"{where} has SGLang {version!r}; supported is {', '.join(SUPPORTED)}. Install a version in this range there."
        )


def installed_version(python: str, env: Mapping[str, str] | None = None) -> str:
    """Version of SGLang in the environment of the interpreter `python`, started with the variables `env`.

    Raises:
        EngineError: the interpreter does not start, or has no SGLang.
    """
    way_out = (
        "Name the interpreter of an environment with SGLang by --server-python (tools/setup_env.sh server makes one for a CPU: "
        ".venv-sglang/bin/python)."
    )
    try:
        done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=60, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"The servers' interpreter {python} does not start: {error}. {way_out}") from error
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
        raise EngineError(f"The environment of {python} has no SGLang ({why[0]}). {way_out}")
    return done.stdout.strip()
