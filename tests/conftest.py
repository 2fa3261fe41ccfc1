"""One thread a test process, one process for the real servers, and a printed reason for each GPU test that cannot run."""

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hold this process, and the ranks that its tests start, to one thread: they share the cores."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails at once instead of waiting
    import torch  # after the environment is set, which it reads

    torch.set_num_threads(1)
    from hypothesis import settings

    settings.register_profile("noisy machine", deadline=None)  # an example that takes long is no fault
    settings.load_profile("noisy machine")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests by file, those with SGLang servers together and first; skip `gpu` without a device, and say so.

    With `--dist loadgroup` a group stays in one process: a server is started once, and never two for one test.
    """
    import torch

    servers = Path(__file__).parent / "sglang"
    items.sort(key=lambda item: servers not in item.path.parents)
    for item in items:
        group = "sglang" if servers in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
