"""Work in other processes, results in the order of the work; few pieces are held at a time. Workers end with their parent."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any


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
    context = multiprocessing.get_context("spawn")  # each holds its own end of its pipe alone, and sees the parent end
    workers = []
    for _ in range(num_workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        process.start()
        theirs.close()
        workers.append((process, ours))
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
        for process, connection in workers:
            connection.close()
            process.terminate()
            process.join()


def _answer(connection: Connection) -> Any:
    result = connection.recv()
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
