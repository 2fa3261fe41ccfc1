"""Workers of tests/layouts that have Transformer Engine's layers on a CPU, in a process of their own."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def report_of(worker, folder, *options):
    """What `worker` found."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, str(TESTS / "layouts" / worker), str(folder), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


def skip_without_engine():
    """Skip a test of the real one where that whose functions `fake_engine_kernels` knows is not installed."""
    try:
        found = version("transformer_engine_torch")
    except PackageNotFoundError:
        found = "not installed"
    if not found.startswith("2.11."):
        pytest.skip(
            f"Transformer Engine 2.11 is wanted, it is {found}: make test-engine compiles it (9 GB, a quarter of an hour)"
        )
