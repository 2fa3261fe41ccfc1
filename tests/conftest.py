"""One thread a test process, and a printed reason for each GPU test that cannot run."""

import os

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no device, and say so."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
