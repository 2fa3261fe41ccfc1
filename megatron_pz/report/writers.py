"""Where a step goes on record: JSON lines, TensorBoard, Weights & Biases. Rank 0 writes, readers see whole rows."""

from __future__ import annotations

import importlib
import io
import itertools
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_pz.errors import ConfigError, DiskError, pip_install
from megatron_pz.report.jsonl import EVAL_FILE, METRICS_FILE, ROLLOUTS_FILE, JsonLines, cut_after
from megatron_pz.report.metrics import check

TENSORBOARD_DIR = "logs/tensorboard"
_FILES = itertools.count()


class RunWriter:
    """All records of a run. Rows of steps after `step`, written by a run that this one continues, are cut off.

    Args:
        run_dir: made if it is not there.
        step: the step that the run continues from; 0 for a new one.
        tensorboard: write event files into `logs/tensorboard`.
        wandb_project: empty: Weights & Biases is neither used nor imported.
        wandb_config: settings to show there.

    Raises:
        DiskError: no room or no right.
        ConfigError: `wandb_project` is set and wandb is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int = 0,
        *,
        tensorboard: bool = True,
        wandb_project: str = "",
        wandb_config: Mapping[str, Any] | None = None,
    ) -> None:
        for name in (METRICS_FILE, ROLLOUTS_FILE, EVAL_FILE):
            cut_after(run_dir / name, step if step else -1)  # a run that begins anew scores step 0 again
        self._metrics = JsonLines(run_dir / METRICS_FILE)
        self._rollouts = JsonLines(run_dir / ROLLOUTS_FILE)
        self._eval = JsonLines(run_dir / EVAL_FILE)
        self._tensorboard = TensorBoard(run_dir / TENSORBOARD_DIR, step) if tensorboard else None
        self._wandb = WandB(wandb_project, run_dir, wandb_config or {}) if wandb_project else None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Put the metrics of `step` on record, everywhere.

        Raises:
            ReportError: a name is not in the table; nothing was written.
        """
        check(values)
        self._metrics.append([{"step": step, **values}])
        if self._tensorboard:
            self._tensorboard.write(step, values)
        if self._wandb:
            self._wandb.write(step, values)

    def rollouts(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to `rollouts.jsonl` (fields: `tasks.journal_rows`)."""
        self._rollouts.append(rows)

    def evaluation(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to `eval.jsonl`."""
        self._eval.append(rows)

    def close(self) -> None:
        """End all records; to be called once, also after an error."""
        for file in (self._metrics, self._rollouts, self._eval):
            file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.close()


class TensorBoard:
    """Scalars as an event file, in TensorBoard's own record format: torch is not needed.

    Not by its EventFileWriter, whose thread meets a full disk out of sight, says so in a traceback, and may leave the
    next flush waiting for ever.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        # Runs of one process within a second are told apart by the number. TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_FILES):06d}"
        self._path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb", buffering=0)
        except OSError as error:
            raise DiskError(
                f"{folder}: TensorBoard's file cannot be opened: {error.strerror}. Set --no-tensorboard."
            ) from error
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # Tells TensorBoard to forget what an earlier run of this folder wrote for later steps.
        start = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), step=step + 1 if step else 0, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One event a step; values that are not finite are left out.

        Raises:
            DiskError: no room; the file is as it was.
        """
        scalars = [Summary.Value(tag=k, simple_value=float(v)) for k, v in values.items() if math.isfinite(v)]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._file.close()

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        size, view = self._file.tell(), record.getbuffer()
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self._file.truncate(size)
            self._file.seek(size)
            raise DiskError(
                f"{self._path}: TensorBoard's event of {len(record.getbuffer())} bytes could not be written: "
                f"{error.strerror}. The file is as it was. Free some room or set --no-tensorboard, and start the run "
                "again; it continues from its last checkpoint."
            ) from error


class WandB:
    """Scalars to Weights & Biases, which is imported here and nowhere else."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        wandb = _import_wandb(project)
        remembered = run_dir / "logs" / "wandb_id"  # a continued run goes on in the same curves
        known = remembered.read_text(encoding="utf-8") if remembered.is_file() else None
        self._run = wandb.init(
            project=project, name=run_dir.name, id=known, dir=str(run_dir), config=dict(config), resume="allow"
        )
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(str(self._run.id), encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _import_wandb(project: str) -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"report.wandb_project is {project!r} and wandb is not installed. "
            f"Run `{pip_install('wandb')}`, or leave --wandb-project empty: metrics.jsonl and TensorBoard hold the same."
        ) from error
