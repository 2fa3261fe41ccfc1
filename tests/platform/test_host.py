"""Free memory of a machine, and of a container with a limit (platform/host.py)."""

import pytest

from megatron_pz.platform.host import available_memory


@pytest.fixture
def meminfo(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       1000 kB\nMemAvailable:    600 kB\n")
    return path


def test_without_a_limit_it_is_the_machine_s(meminfo, tmp_path):
    assert available_memory(meminfo, tmp_path / "none") == 600 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert available_memory(meminfo, tmp_path) == 600 * 1024


def test_a_container_has_what_its_limit_leaves_and_files_that_can_go(meminfo, tmp_path):
    for name, text in (
        ("memory.max", "200000"),
        ("memory.current", "150000"),
        ("memory.stat", "anon 9\ninactive_file 30000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert available_memory(meminfo, tmp_path) == 80_000


def test_this_machine_has_some():
    assert available_memory() > 0
