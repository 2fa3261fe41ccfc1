"""Convert a model: Hugging Face folder to Megatron checkpoint, and back.

    python tools/convert_checkpoint.py SRC DST --to megatron [--dtype bfloat16] [--verify]
    python tools/convert_checkpoint.py runs/demo/checkpoints/step_000080 DST --to hf [--hf-model FOLDER] [--verify]

Goes tensor by tensor on any CPU. DST appears when it is complete; after a kill the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from megatron_pz.errors import MegatronPZError
from megatron_pz.models.folder import resolve_folder
from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported
from megatron_pz.checkpoint import convert  # noqa: E402
from megatron_pz.checkpoint.compared import differences  # noqa: E402

DTYPES = ("keep", "bfloat16", "float16", "float32", convert.FP8)


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 after an error, or 1 where `--verify` finds a difference."""
    given = arguments(argv)
    try:
        dtype = given.dtype if given.dtype == convert.FP8 else getattr(torch, given.dtype, None)
        if given.to == "megatron":
            if isinstance(dtype, str):
                raise MegatronPZError(f"--dtype {dtype} is for servers: use it with --to hf.")
            source = hf_dir = resolve_folder(given.source)
            with shown(f"to {given.destination}", convert.source_bytes(source)) as advance:
                convert.to_megatron(source, given.destination, dtype=dtype, advance=advance)
        else:
            source = Path(given.source)
            if not (source / convert.SHARDS).is_dir():
                raise MegatronPZError(
                    f"{source} is no checkpoint: it has no folder {convert.SHARDS}/. Name a step_NNNNNN folder of a run."
                )
            hf_dir = resolve_folder(given.hf_model) if given.hf_model else convert.hf_folder_of(source)
            with shown(f"to {given.destination}", convert.source_bytes(source)) as advance:
                convert.to_hf(source, given.destination, hf_dir, dtype=dtype, advance=advance)
        if not given.verify:
            return 0
        pair = (source, given.destination) if given.to == "megatron" else (given.destination, source)
        with shown("verify", convert.source_bytes(given.destination)) as advance:
            unequal = differences(*pair, dtype=dtype, is_source_hf=given.to == "megatron", advance=advance)
    except MegatronPZError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    if unequal:
        sys.stderr.write(f"{len(unequal)} tensors differ from the source: {', '.join(unequal[:12])}\n")
        return 1
    sys.stdout.write("verified: every tensor equals the source bit for bit\n")
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="Hugging Face folder or hub name; a checkpoint with --to hf")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to be made")
    parser.add_argument("--to", choices=("megatron", "hf"), required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the tensors written")
    parser.add_argument("--hf-model", default="", help="folder with config.json and tokenizer, where SRC names none")
    parser.add_argument("--verify", action="store_true", help="read both again and compare bit for bit")
    return parser.parse_args(argv)


@contextmanager
def shown(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
        progress.update(task, completed=total)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
