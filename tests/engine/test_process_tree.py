"""Nothing of a server outlives the trainer, however either of them ends. A small tree of processes stands for a server's."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_pz.engine.sglang import process
from megatron_pz.engine.sglang.process import ProcessTree
from megatron_pz.errors import EngineError

# A command with a child, and a grandchild in a session of its own whose parent has ended; the last two refuse SIGTERM.
# Each writes its process id into a file.
TREE = """
import os, signal, sys, time
def note(name):
    with open(f"{sys.argv[1]}/{name}.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"{sys.argv[1]}/{name}.new", f"{sys.argv[1]}/{name}")
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            note("orphan")
            time.sleep(600)
        os._exit(0)
    note("child")
    time.sleep(600)
note("main")
print("up", flush=True)
time.sleep(600)
"""
# A trainer that has started such a tree, and ends by what its argument says.
TRAINER = """
import sys, time
from pathlib import Path
from megatron_pz.engine.sglang.process import ProcessTree
folder = Path(sys.argv[1])
ProcessTree([sys.executable, "-c", (folder / "tree.py").read_text(), str(folder)], {}, folder / "log").start()
while not all((folder / name).exists() for name in ("main", "child", "orphan")):
    time.sleep(0.02)
if sys.argv[2] == "crash":
    raise RuntimeError("a fault of the trainer")
(folder / "waiting").touch()
time.sleep(600)
"""


def pids(folder: Path) -> list[int]:
    """Of the tree's three processes, as soon as all are up."""
    paths = [folder / name for name in ("main", "child", "orphan")]
    wait_until(lambda: all(path.exists() for path in paths))
    return [int(path.read_text()) for path in paths]


def alive(pid: int) -> bool:
    """Whether `pid` runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(is_so, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE_S", 0.5)
    tree = ProcessTree([sys.executable, "-c", TREE, str(tmp_path)], dict(os.environ), tmp_path / "logs" / "log")
    yield tree
    tree.stop(at_once=True)


@pytest.mark.parametrize("at_once", [False, True])
def test_stop_leaves_nothing_not_even_what_refuses_and_has_fled(tree, tmp_path, at_once):
    tree.start()
    found = pids(tmp_path)
    assert tree.is_alive() and tree.pid == found[0] and all(map(alive, found))
    tree.stop(at_once=at_once)
    assert not any(map(alive, found)) and not tree.is_alive()
    assert tree.ending() == ("SIGKILL" if at_once else "SIGTERM")
    tree.stop()  # once more does nothing


def test_a_tree_that_hangs_is_stopped(tree, tmp_path):
    tree.start()
    found = pids(tmp_path)
    os.kill(found[0], signal.SIGSTOP)
    tree.stop()
    assert not any(map(alive, found))


def test_when_the_command_is_killed_the_rest_goes_too_and_it_is_seen(tree, tmp_path):
    tree.start()
    found = pids(tmp_path)
    os.kill(tree.pid, signal.SIGKILL)
    wait_until(lambda: not tree.is_alive())
    assert not any(map(alive, found))
    assert tree.ending() == "SIGKILL" and tree.tail() == "up"


def test_the_command_does_not_outlive_its_killed_supervisor(tree, tmp_path):
    tree.start()
    found = pids(tmp_path)
    os.kill(int(Path(f"/proc/{tree.pid}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    wait_until(lambda: not alive(found[0]))
    assert not tree.is_alive()
    for pid in found[1:]:  # SGLang's end themselves when their main process is gone; these do not
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", "SIGTERM", "crash"])
def test_nothing_outlives_the_trainer(tmp_path, end):
    (tmp_path / "tree.py").write_text(TREE)
    script = TRAINER.replace(
        "from megatron_pz", "from megatron_pz.engine.sglang import process\nprocess.GRACE_S = 0.5\nfrom megatron_pz"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), end], stderr=subprocess.DEVNULL)
    found = pids(tmp_path)
    if end != "crash":
        wait_until((tmp_path / "waiting").exists)
        trainer.send_signal(getattr(signal, end))
    trainer.wait(20)
    wait_until(lambda: not any(map(alive, found)))


def test_what_a_killed_trainer_left_behind_is_gone_before_the_next_begins(tmp_path, tree):
    (tmp_path / "tree.py").write_text(TREE)
    script = TRAINER.replace(
        "from megatron_pz", "from megatron_pz.engine.sglang import process\nprocess.GRACE_S = 3\nfrom megatron_pz"
    ).replace('folder / "log"', 'folder / "logs" / "log"')
    trainer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), "SIGKILL"])
    before = pids(tmp_path)
    wait_until((tmp_path / "waiting").exists)
    trainer.kill()
    trainer.wait()
    checked = []
    tree.start(lambda: checked.append([pid for pid in before if alive(pid)]))
    assert checked == [[]]


def test_an_exit_code_and_the_last_words_are_kept_without_the_noise_after_them(tmp_path):
    text = textwrap.dedent("""
        import sys
        for i in range(30): print("line", i)
        print("the error")
        print("nanobind: leaked 3 types!\\n - leaked type x\\n - ... skipped remainder")
        sys.exit(3)
    """)
    tree = ProcessTree([sys.executable, "-c", text], {}, tmp_path / "log")
    tree.start()
    wait_until(lambda: not tree.is_alive())
    assert tree.ending() == "exit code 3"
    assert tree.tail(2) == "line 29\nthe error"
    tree.command[-1] = "print('again')"
    tree.start()
    wait_until(lambda: not tree.is_alive())
    assert tree.tail() == "again"  # of the last start alone; the file has both
    assert "the error" in (tmp_path / "log").read_text()


def test_a_program_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(EngineError, match="/no/such/python: No such file"):
        ProcessTree(["/no/such/python"], {}, tmp_path / "log").start()
