"""The background thread in which servers are talked with (engine/sglang/io_thread.py)."""

import asyncio
import os
import signal
import threading
import time

import pytest

from megatron_pz.engine.sglang.io_thread import IoThread


@pytest.fixture
def io():
    thread = IoThread()
    yield thread
    thread.close()


async def name_of_thread():
    return threading.current_thread().name


async def value(of):
    return of


def test_a_coroutine_runs_in_the_thread_and_its_result_arrives(io):
    assert io.run(name_of_thread()) == "server talk" != threading.current_thread().name
    assert io.submit(value(3)).result(5) == 3


def test_what_is_submitted_runs_while_the_main_thread_does_something_else(io):
    done = threading.Event()

    async def work():
        await asyncio.sleep(0.01)
        done.set()

    io.submit(work())
    assert done.wait(5)


def test_an_error_arrives_as_itself(io):
    async def fail():
        raise KeyError("what")

    with pytest.raises(KeyError, match="what"):
        io.run(fail())
    assert io.run(value(1)) == 1  # and the thread goes on


def test_to_wait_within_the_thread_for_the_thread_is_refused(io):
    async def outer():
        io.run(value(1))

    with pytest.raises(RuntimeError, match="its own thread.*await"):
        io.run(outer())


def test_ctrl_c_ends_the_wait_and_cancels_what_was_waited_for(io):
    cancelled = threading.Event()

    async def forever():
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        io.run(forever())
    assert cancelled.wait(5)


def test_closing_cancels_what_is_under_way_and_what_that_begins_and_may_be_repeated():
    io, log = IoThread(), []

    async def last_words():
        try:
            await asyncio.sleep(3600)
        finally:
            log.append("last words")

    async def forever():
        try:
            await asyncio.sleep(3600)
        finally:
            log.append("cancelled")
            tasks.append(asyncio.ensure_future(last_words()))
            await asyncio.sleep(0)

    tasks = []
    future = io.submit(forever())
    while not asyncio.all_tasks(io.loop):
        time.sleep(0.001)
    io.run(value(0))
    io.close()
    io.close()
    assert log[0] == "cancelled" and future.cancelled() and tasks[0].cancelled()
    assert "server talk" not in [thread.name for thread in threading.enumerate()]
