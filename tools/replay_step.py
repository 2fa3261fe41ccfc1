"""Repeat an update that a run refused, or train on rounds that were saved: no server, and no game is played.

Why was it refused: repeat an update whose loss or gradient was not finite, and name the tokens to blame.

    python tools/replay_step.py RUN_DIR/dumps/step_000123-rank0.pt                       a run of one process
    torchrun --nproc-per-node N tools/replay_step.py RUN_DIR/dumps/step_000123-rank0.pt  a run of N: any rank's file

    The dump holds settings, weights and micro-batches: nothing of the run directory is changed. Exits with 0 if the
    update is refused again, with 1 if it is not, with 2 if the dump cannot be used.

What does a saved round teach: apply the updates of rounds in RUN_DIR/journal, of a run or of tools/play.py.

    [torchrun --nproc-per-node N] tools/replay_step.py RUN_DIR STEP[-STEP] [options] [--flag value ...]

    --checkpoint STEP   go on from this checkpoint of RUN_DIR, with its optimizer; else from --hf-model
    --export FOLDER     write the policy there afterwards, as a Hugging Face folder

    Settings are those of RUN_DIR/config.toml, over which flags of a run may be given (--lr 1e-6). Prints the metrics of
    each step as a line of JSON. Exits with 0 if all updates were applied, else with 2.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pz.config.load import load_config
from megatron_pz.config.rules import validate
from megatron_pz.config.schema import Config
from megatron_pz.config.tables import from_tables
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.errors import LayoutError, MegatronPZError, NumericsError
from megatron_pz.platform.select import select_platform
from megatron_pz.report.jsonl import to_line
from megatron_pz.train.dump import Dump, Weights, read_dump
from megatron_pz.train.forward import DeviceBatch, run_schedule, whole_rows
from megatron_pz.train.model import build_model
from megatron_pz.train.parallel import init_parallel, shutdown
from megatron_pz.train.replay import train_on_saved
from megatron_pz.train.step import Trainer
from megatron_pz.types import MicroBatch, Tokenizer

SHOWN = 16  # positions of a sequence, rows of a weight
SHOWN_NAMES = 4


def main(argv: Sequence[str]) -> int:
    """See the module."""
    if not argv or argv[0].startswith("-") or (len(argv) > 1 and not Path(argv[0]).is_dir()):
        sys.stderr.write((__doc__ or "") + "\n")
        return 2
    try:
        if Path(argv[0]).is_dir():
            learn(Path(argv[0]), argv[1:])
            return 0
        dump = read_dump(_own_file(Path(argv[0])))
        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        if dump.world_size != wanted:
            raise LayoutError(
                f"{argv[0]} is of a run of {dump.world_size} processes, found {wanted}. "
                f"Start it with torchrun --nproc-per-node {dump.world_size}."
            )
        return 0 if replay(dump) else 1
    except MegatronPZError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2


def learn(run_dir: Path, argv: Sequence[str]) -> None:
    """Train on saved rounds; metrics are printed."""
    parser = argparse.ArgumentParser(prog="tools/replay_step.py RUN_DIR", allow_abbrev=False)
    parser.add_argument("steps", type=_steps)
    parser.add_argument("--checkpoint", type=int)
    parser.add_argument("--export", type=Path)
    given, flags = parser.parse_known_args(argv)
    config = load_config([str(run_dir / "config.toml"), *flags])
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))

    def tell(step: int, metrics: dict[str, float]) -> None:
        print(to_line({"step": step, **metrics}), end="", flush=True)

    train_on_saved(config, run_dir, given.steps, checkpoint=given.checkpoint, export=given.export, tell=tell)


def _steps(text: str) -> range:
    """`7` or `7-9`, the last included."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def replay(dump: Dump) -> bool:
    """Whether the update is refused again; what is not finite is printed on the way."""
    config = from_tables(tomllib.loads(dump.settings), "the dump")
    config = replace(config, model=replace(config.model, init="random"))  # weights come from the dump
    platform = select_platform()
    if platform.name == "cpu":
        torch.set_num_threads(1)  # as the run: sums must not depend on it
    parallel = init_parallel(config.parallel, platform, config.train.seed)
    try:
        chunks = build_model(dump.hf_config, config, platform, parallel)
        _put(dump.weights, chunks)
        trainer = Trainer(chunks, config, platform, parallel)
        weights = _named(chunks, "data")
        lines = [f"weights: {line}" for line in (*_not_finite(weights), _largest(weights))]
        lines += _blamed(trainer, dump, _tokenizer(config))
        error = _repeat(trainer, dump)
        lines += [f"gradients: {line}" for line in _not_finite(_named(chunks, "main_grad"))]
        _in_turn([f"rank {parallel.rank}: {line}" for line in lines])
        if parallel.is_rank0:
            same = "the same numbers" if error == dump.error else "other numbers"
            print(f"refused then:  {dump.error}")
            print(
                f"refused now:   {error}\nreproduced, with {same}" if error else "NOT reproduced: the update is finite"
            )
        return error is not None
    finally:
        shutdown()


def _own_file(path: Path) -> Path:
    """The file of this process's rank, beside the named one."""
    return path.with_name(re.sub(r"-rank\d+\.pt$", f"-rank{os.environ.get('RANK', '0')}.pt", path.name))


@torch.no_grad()
def _put(weights: Weights, chunks: Sequence[torch.nn.Module]) -> None:
    for chunk, values in zip(chunks, weights, strict=True):
        for name, parameter in chunk.named_parameters():
            parameter.copy_(values[name])


def _repeat(trainer: Trainer, dump: Dump) -> str | None:
    """What the refusal says; None if the update was applied."""
    try:
        trainer.step(dump.plan, lr_step=dump.step, old_log_probs=dump.old_log_probs, ref_log_probs=dump.ref_log_probs)
    except NumericsError as error:
        return str(error)
    return None


def _blamed(trainer: Trainer, dump: Dump, tokenizer: Tokenizer | None) -> list[str]:
    """A line for each sequence with a token whose loss is not finite, and a summary of each micro-batch with one."""
    lines: list[str] = []
    mine = dump.plan.micro_batches[trainer.parallel.dp_rank]

    def losses(batch: DeviceBatch, output: Tensor) -> tuple[Tensor, Tensor, np.ndarray]:
        each = np.array([_token_loss(trainer, batch, output, at) for at in range(output.shape[1])], np.float64)
        return output.sum(), (batch.weights > 0).sum().int(), each

    with torch.no_grad():
        collected = run_schedule(
            trainer.chunks,
            mine,
            losses,
            trainer.platform,
            temperature=trainer.temperature,
            old_log_probs=dump.old_log_probs,
            ref_log_probs=dump.ref_log_probs,
            forward_only=True,
        )
    rows = whole_rows(collected, mine)
    for number, (batch, each) in enumerate(zip(mine, rows, strict=False)):  # none but on the last stage
        broken = list(_broken_sequences(batch, torch.from_numpy(each)))
        if broken:
            total, trained = sum(each), int((batch.loss_weights > 0).sum())
            lines.append(
                f"micro-batch {number}: loss {total:g}, {sum(len(at) for _, _, _, at in broken)} of {trained} trained "
                f"tokens in {len(broken)} of {len(batch.sample_indices)} sequences are not finite"
            )
        for sequence, start, loss, at in broken:
            lines.append(f"  sequence {sequence} (sample {batch.sample_indices[sequence]}): loss {loss:g}")
            lines.append(f"    tokens predicted at positions {_some([str(t - start) for t in at])}")
            first = at[0]
            ids = [int(i) for i in batch.token_ids[max(start, first - 7) : first + 1]]
            text = f" {tokenizer.decode(ids)!r}" if tokenizer else ""
            lines.append(f"    the first of them after the ids {ids}{text}")
    return lines


def _token_loss(trainer: Trainer, batch: DeviceBatch, output: Tensor, at: int) -> float:
    """Loss of the token predicted at position `at`, by the objective that trains on it."""
    if batch.weights[at] <= 0:
        return 0.0

    def cut(values: Tensor | None) -> Any:
        return None if values is None else values[at : at + 1]

    one = replace(
        batch,
        weights=cut(batch.weights),
        advantages=cut(batch.advantages),
        rollout_log_probs=cut(batch.rollout_log_probs),
        is_generator=cut(batch.is_generator),
        old_log_probs=cut(batch.old_log_probs),
        ref_log_probs=cut(batch.ref_log_probs),
    )
    return float(trainer.objective(one, output[:, at : at + 1])[0])


def _broken_sequences(batch: MicroBatch, each: Tensor) -> Iterator[tuple[int, int, float, list[int]]]:
    """(sequence, its first position, its loss, positions whose loss is not finite), where there are such."""
    for sequence, (start, end) in enumerate(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)):
        at = [int(start) + int(i) for i in (~torch.isfinite(each[start:end])).nonzero()[:, 0]]
        if at:
            yield sequence, int(start), float(each[start:end].sum()), at


def _named(chunks: Sequence[torch.nn.Module], what: str) -> list[tuple[str, Tensor]]:
    return [(name, getattr(parameter, what)) for chunk in chunks for name, parameter in chunk.named_parameters()]


def _not_finite(named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """One line on the tensors that have such numbers, with their rows (of an embedding: ids); none if all are finite."""
    told = []
    for name, values in named:
        broken = ~torch.isfinite(values)
        if broken.any():
            rows = broken.reshape(values.shape[0], -1).any(1).nonzero()[:, 0].tolist()
            where = "all rows" if len(rows) == values.shape[0] else f"rows {_some([str(row) for row in rows])}"
            told.append(f"{name} ({int(broken.sum())} of {values.numel()}, {where})")
    return [f"not finite in {len(told)} of {len(named)} tensors: {_some(told, SHOWN_NAMES)}"] if told else []


def _largest(named: Sequence[tuple[str, Tensor]]) -> str:
    """Where a run has diverged, weights are large before they are no numbers."""
    name, values = max(named, key=lambda pair: float(pair[1].abs().nan_to_num(0.0).max()))
    return f"the largest is {float(values.abs().nan_to_num(0.0).max()):g}, in {name}"


def _some(items: Sequence[str], shown: int = SHOWN) -> str:
    rest = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _tokenizer(config: Config) -> Tokenizer | None:
    """For the text beside the ids; the dump may be read where the tokenizer is not."""
    try:
        return load_tokenizer(config.model.tokenizer or config.model.hf_model)
    except MegatronPZError:
        return None


def _in_turn(lines: Sequence[str]) -> None:
    """Print, one rank after the other."""
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            print("\n".join(lines), flush=True) if lines else None
        dist.barrier()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
