"""Work in other processes, results in the order of the work; few pieces are held at a time. Workers end with their parent."""

from __future__ import annotations

import functools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from megatron_pz.errors import CorpusError


def in_order(make: Callable[[], Callable[[Any], Any]], work: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """`make()(piece)` for each piece of `work`, in order.

    Args:
        make: is called once a process; must be picklable.
        num_workers: 1: this process does all. One piece a worker is in memory.
    """
    if num_workers <= 1:
        function = make()
        yield from (function(piece) for piece in work)
        return
    workers = [_start(make) for _ in range(num_workers)]
    try:
        asked: deque[Connection] = deque()
        for number, piece in enumerate(work):
            connection = workers[number % num_workers][1]
            if (
                len(asked) == num_workers
            ):  # of this worker: two that send large pieces to each other would wait for ever
                yield _answer(asked.popleft())
            connection.send(piece)
            asked.append(connection)
        while asked:
            yield _answer(asked.popleft())
    finally:
        for worker in workers:
            _end(*worker)


def elsewhere(function: Callable[[Any], Any], argument: Any) -> Any:
    """`function(argument)` of a process that ends with it: what it loaded is gone."""
    process, connection = _start(functools.partial(_same, function))
    try:
        connection.send(argument)
        return _answer(connection)
    finally:
        _end(process, connection)


def _same(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return function


def _start(make: Callable[[], Callable[[Any], Any]]) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")  # each holds its own end of its pipe alone, and sees the parent end
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(make, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _end(process: SpawnProcess, connection: Connection) -> None:
    connection.close()
    process.terminate()
    process.join()


def _answer(connection: Connection) -> Any:
    try:
        result = connection.recv()
    except EOFError as error:
        raise CorpusError(
            "A worker process ended before it answered; the system ends those that take too much memory. Give fewer --workers; the "
            "same command goes on where it was."
        ) from error
    if isinstance(result, Exception):
        raise result
    return result


def _serve(make: Callable[[], Callable[[Any], Any]], connection: Connection) -> None:
    try:
        function = make()
        while True:
            connection.send(function(connection.recv()))
    except EOFError:  # the parent is done or gone
        return
    except Exception as error:  # noqa: BLE001 - it is raised again where the work was asked for
        connection.send(error)
