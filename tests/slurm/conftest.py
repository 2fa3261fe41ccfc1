"""A Slurm for the tests of this folder that one process runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Slurm, cluster, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two idle nodes."""
    if why := missing():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder)) as running:
        yield running
