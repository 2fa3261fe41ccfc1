"""What has been written is on disk, and stays there when the machine stops."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path


def sync_files(folder: Path, done: Collection[str]) -> None:
    """Have every file of `folder` on disk but those that are, and every folder."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        elif str(path.relative_to(folder)) not in done:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
