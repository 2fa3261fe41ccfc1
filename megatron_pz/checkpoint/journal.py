"""Completions of the rounds that may have to be played again, on disk as they land.

A run that was killed goes on from its last checkpoint, which may be several steps back. What those steps generated is in
`RUN_DIR/journal/step_NNNNNN.jsonl`, one line a completion, and is read back instead of generated again.

1. A completion is on disk about `GATHER_S` after it landed; a thread writes and syncs, several at a time, so that the
   event loop never waits for the disk.
2. A request is answered from the record once for each time that it was answered before, and generated after that.
3. A record counts only if the weights are those that sampled it: their digest is part of the key where the caller gives
   one, and their versions must lie in the range that it names.
4. A response that the engine gave up (`abort`) is not recorded.
5. Files go once the oldest checkpoint that is kept makes them useless.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_pz.checkpoint.completion_lines import completions, read_lines, request_key, to_row
from megatron_pz.checkpoint.durable import sync_folder
from megatron_pz.errors import DiskError
from megatron_pz.report.jsonl import JsonLines
from megatron_pz.types import Completion, Generate, Paragraph, SamplingParams

JOURNAL_FOLDER = "journal"
"""In a run directory."""
GATHER_S = 0.02
"""Seconds for which completions are gathered before they are written together."""
_NAME = re.compile(r"step_(\d+)\.jsonl")

Place = tuple[int, int]
"""A paragraph that is played: the step that began it, and its index among the paragraphs of that step."""


class Writer:
    """Appends rows to files from a thread of its own."""

    def __init__(self) -> None:
        self._rows: queue.SimpleQueue[tuple[Path, Mapping[str, Any]] | threading.Event | None] = queue.SimpleQueue()
        self._error: DiskError | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def put(self, path: Path, row: Mapping[str, Any]) -> None:
        """Have `row` appended to `path`, soon.

        Raises:
            DiskError: an earlier row could not be written.
        """
        self._check()
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="completion journal", daemon=True)
                self._thread.start()
        self._rows.put((path, row))

    def flush(self) -> None:
        """Wait until everything that was put is on disk.

        Raises:
            DiskError: not all of it is.
        """
        if self._thread is not None:
            written = threading.Event()
            self._rows.put(written)
            written.wait()
        self._check()

    def close(self) -> None:
        """Write what was put, and end the thread. May be called twice.

        Raises:
            DiskError: see `flush`.
        """
        with self._starting:
            if self._thread is not None:
                self._rows.put(None)
                self._thread.join()
                self._thread = None
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        is_open = True
        while is_open:
            items = [self._rows.get()]
            if isinstance(items[0], tuple):
                time.sleep(GATHER_S)
            with suppress(queue.Empty):
                while True:
                    items.append(self._rows.get_nowait())
            by_file: dict[Path, list[Mapping[str, Any]]] = defaultdict(list)
            for item in items:
                if isinstance(item, tuple):
                    by_file[item[0]].append(item[1])
            for path, rows in by_file.items():
                if self._error is None:
                    self._write(path, rows)
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
            is_open = None not in items

    def _write(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        is_new = not path.exists()
        try:
            file = JsonLines(path)
            try:
                file.append(rows)
                file.sync()
            finally:
                file.close()
            if is_new:
                sync_folder(path.parent)
        except DiskError as error:
            self._error = error
        except OSError as error:
            self._error = DiskError(f"{path} could not be written: {error.strerror}. Free some room and start again.")


class Journalled:
    """A `types.Generate` that answers from the record what is on it, and puts on record what is not.

    Args:
        generate: what answers the rest.
        path: file of the round's records.
        writer: appends to it.
        step: of the round.
        weights: digest of the weights that sample; "" where they may change during the round.
        versions: first and last policy version whose tokens may be read back; None: any.
    """

    def __init__(
        self,
        generate: Generate,
        path: Path,
        writer: Writer,
        *,
        step: int,
        weights: str = "",
        versions: tuple[int, int] | None = None,
    ) -> None:
        self._generate, self._path, self._writer, self._step, self._weights = generate, path, writer, step, weights
        self._recorded: dict[str, deque[Completion]] = defaultdict(deque)
        for recorded in completions(read_lines(path)):
            stamps = recorded.completion.weight_versions
            if versions is None or all(versions[0] <= stamp <= versions[1] for stamp in stamps):
                self._recorded[recorded.key].append(recorded.completion)
        self.num_read = 0  # requests answered from the record
        self.num_generated = 0

    async def __call__(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        key = request_key(prompt_ids, params, self._step, self._weights)
        if recorded := self._recorded.get(key):
            self.num_read += 1
            return recorded.popleft()
        completion = await self._generate(prompt_ids, params)
        self.num_generated += 1
        if completion.finish_reason != "abort":
            self._writer.put(self._path, to_row(key, completion))
        return completion


class CompletionJournal:
    """The records of a run. Rank 0 makes one.

    Args:
        folder: `journal/` of the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._writer = folder, Writer()

    def path(self, step: int) -> Path:
        """File of the round of `step`."""
        return self.folder / f"step_{step:06d}.jsonl"

    def keep(
        self, generate: Generate, step: int, *, weights: str = "", versions: tuple[int, int] | None = None
    ) -> Journalled:
        """`generate` with the record of the round of `step` in front of it; see `Journalled`."""
        self.flush()  # the round may have been begun before, in this process
        kept = Journalled(generate, self.path(step), self._writer, step=step, weights=weights, versions=versions)
        self._writer.put(self.path(step), {"weights": weights})  # whoever tells the round again must know
        return kept

    def note_begun(self, step: int, seed: int, paragraphs: Sequence[Paragraph]) -> None:
        """Put on record what the round of `step` plays, so that it can be told again without the corpus.

        Args:
            seed: of the run.
        """
        begun = [[p.id, p.text, p.title, p.source] for p in paragraphs]
        self._writer.put(self.path(step), {"begun": begun, "seed": seed})

    def note_taken(self, step: int, taken: Sequence[Place], weights: str = "") -> None:
        """Put on record which paragraphs the round of `step` ended with, where it did not wait for all."""
        self._writer.put(self.path(step), {"taken": [list(place) for place in taken], "weights": weights})

    def taken(self, step: int, weights: str = "") -> list[Place] | None:
        """What an earlier process noted last for the round of `step` under these weights; None: nothing."""
        noted = [row for row in read_lines(self.path(step)) if "taken" in row and row.get("weights") == weights]
        return [(begun, place) for begun, place in noted[-1]["taken"]] if noted else None

    def prune(self, oldest: int) -> None:
        """Remove the records of all steps up to `oldest`, which no resume can reach: it goes back to the oldest
        checkpoint that is kept, at most."""
        self.flush()
        if self.folder.is_dir():
            for file in [*self.folder.iterdir()]:
                if (found := _NAME.fullmatch(file.name)) and int(found[1]) <= oldest:
                    file.unlink(missing_ok=True)

    def flush(self) -> None:
        """Wait until everything is on disk.

        Raises:
            DiskError: no room or no right; what was written before is whole.
        """
        self._writer.flush()

    def close(self) -> None:
        """Write the rest and end the thread. May be called twice.

        Raises:
            DiskError: see `flush`.
        """
        self._writer.close()
