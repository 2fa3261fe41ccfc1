"""Garbage that refers to itself goes once a step, and what the run began with is not looked through again."""

import subprocess
import sys

SCRIPT = """
import gc, weakref
from megatron_pz.platform.select import select_platform
select_platform("cpu")  # before Megatron is imported
from megatron_pz.train.collector import THRESHOLDS, collect, spared_collector

class Node:
    pass

before = gc.get_threshold()
with spared_collector():
    assert gc.get_threshold() == THRESHOLDS
    assert gc.get_freeze_count() > 100_000, gc.get_freeze_count()  # torch alone brings more
    node = Node()
    node.itself = node
    gone = weakref.ref(node)
    del node
    rows = [[i] for i in range(5000)]  # Python's own thresholds would have it looked for seven times
    assert gone() is not None
    collect()
    assert gone() is None
assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)
"""


def test_it_is_seldom_and_once_a_step():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
