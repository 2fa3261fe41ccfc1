"""One thread a test process, Ctrl-C heard, one process for the real servers, and a printed reason for each GPU test that cannot run."""

import os
import signal
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling


def pytest_configure(config: pytest.Config) -> None:
    """Hold this process, and the ranks that its tests start, to one thread: they share the cores.

    A shell that puts `make test` into the background has it ignore Ctrl-C; the tests of Ctrl-C need it heard.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails at once instead of waiting
    import torch  # after the environment is set, which it reads

    torch.set_num_threads(1)
    from hypothesis import settings

    settings.register_profile("noisy machine", deadline=None)  # an example that takes long is no fault
    settings.load_profile("noisy machine")


SERVERS = "tests/sglang/"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Under `--dist loadfile` the tests of a file stay in one process, and all those with SGLang servers in one.

    So a server is started once, and never two for one test.
    """
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return SERVERS if nodeid.startswith(SERVERS) else super()._split_scope(nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with servers come first, for they wait most; `gpu` is skipped without a device, and says so."""
    import torch

    items.sort(key=lambda item: not item.nodeid.startswith(SERVERS))

    for item in items:
        if item.get_closest_marker("gpu"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
            elif item.nodeid.startswith("tests/gpu/") and not ON_GPU:
                item.add_marker(pytest.mark.skip(reason="`make test-gpu` runs it: a process has one platform"))


ON_GPU = os.environ.get("PZ_NEEDS_GPU") == "1"
"""Set by `make test-gpu`: a machine without a device fails it."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`make test-gpu` must not pass where it could test nothing."""
    import torch

    if ON_GPU and not torch.cuda.is_available():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Why `make test-gpu` failed, in one line."""
    import torch

    if ON_GPU and not torch.cuda.is_available():
        count = len(terminalreporter.stats.get("skipped", []))
        terminalreporter.write_line(f"test-gpu: no CUDA device here, {count} tests did not run; this counts as failed")
