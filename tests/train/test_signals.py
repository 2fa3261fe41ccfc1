"""Signals that ask a run to stop: noted, told by name, and handed back."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_pz.train.signals import STOPPING, StopSignals

ROOT = Path(__file__).parents[2]

PAIR = """
import os, signal, sys
import torch.distributed as dist
from megatron_pz.train.signals import StopSignals
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
with StopSignals(dist.group.WORLD) as signals:
    before = signals.agreed()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    sys.stdout.write(f"{before!r} {signals.agreed()!r}")
dist.destroy_process_group()
"""


def test_nothing_is_asked_at_first():
    with StopSignals() as signals:
        assert signals.agreed() == ""


@pytest.mark.parametrize("number", STOPPING)
def test_each_stopping_signal_is_noted_and_named(number):
    with StopSignals() as signals:
        os.kill(os.getpid(), number)  # would end this process if it were not caught
        assert signals.agreed() == signal.Signals(number).name
        assert signals.agreed() == signal.Signals(number).name  # it is not forgotten


def test_sigterm_and_sigusr1_stop_alike_however_often_they_come():
    with StopSignals() as signals:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.agreed() == "SIGTERM"


def test_a_second_interrupt_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.agreed() == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_as_before_after_the_block_and_after_an_error():
    before = [signal.getsignal(number) for number in STOPPING]
    with pytest.raises(ZeroDivisionError), StopSignals():
        assert [signal.getsignal(number) for number in STOPPING] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_a_signal_to_one_rank_stops_all(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = [sys.executable, "-W", "ignore", "-c", PAIR, str(tmp_path / "meeting")]
    pair = [subprocess.Popen([*job, rank], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for rank in "01"]
    assert [process.communicate(timeout=150)[0] for process in pair] == ["'' 'SIGUSR1'"] * 2
    assert [process.returncode for process in pair] == [0, 0]
