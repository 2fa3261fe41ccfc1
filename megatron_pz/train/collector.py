"""When Python looks for garbage that refers to itself: once a step, and seldom in between.

A round makes some containers for every token (a reply of a server has a list for each), which is what the collector
counts: left to itself it looks through them, and at times through all that torch and transformers have loaded, in the middle
of play. That was two fifths of what rank 0 can do (benchmarks/records/controller.md).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (100_000, 20, 20)
"""Containers made and not yet given back before the youngest are looked through, and how often that is done before the older
ones are. Python's own are 700, 10 and 10."""


@contextmanager
def spared_collector() -> Iterator[None]:
    """Look through what is there now once, and not again; through what comes, seldom. Undone at the end."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def collect() -> None:
    """Give back what refers to itself, tensors that it holds included."""
    gc.collect()
