"""A completion as one line of JSON, without loss: ids, log-probs and experts come back bit for bit.

Arrays stand as base64 of their little-endian bytes; log-probs as float32 where that says the same, else as float64.
The key of a request is a digest of all that decides its answer, so that a line answers no other request.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pz.report.jsonl import parse
from megatron_pz.types import Completion, SamplingParams


@dataclass(frozen=True, slots=True)
class Recorded:
    """A line: the answer to the request `key`."""

    key: str
    completion: Completion


def request_key(prompt_ids: Sequence[int], params: SamplingParams, step: int, weights: str = "") -> str:
    """Name of a request of the round of `step`; 32 hex digits.

    Args:
        weights: digest of the weights that sample, where the caller has one: other weights, other key.
    """
    digest = hashlib.blake2b(repr((step, weights, params)).encode(), digest_size=16)
    digest.update(np.asarray(prompt_ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def to_row(key: str, completion: Completion) -> dict[str, Any]:
    """The object that the line holds."""
    logprobs = np.asarray(completion.logprobs, dtype="<f8")
    with np.errstate(over="ignore"):
        narrow = logprobs.astype("<f4")
    is_exact = np.array_equal(narrow.astype("<f8"), logprobs, equal_nan=True)
    return {
        "key": key,
        "prompt_ids": _coded(np.asarray(completion.prompt_ids, dtype="<i4")),
        "token_ids": _coded(np.asarray(completion.token_ids, dtype="<i4")),
        "logprobs": _coded(narrow if is_exact else logprobs),
        "finish_reason": completion.finish_reason,
        "weight_versions": [[version, len([*run])] for version, run in groupby(completion.weight_versions)],
        "routed_experts": None
        if completion.routed_experts is None
        else _experts(np.asarray(completion.routed_experts)),
    }


def from_row(row: Mapping[str, Any]) -> Recorded | None:
    """What `row` holds; None if it is no completion, or a damaged one."""
    try:
        token_ids = tuple(_decoded(row["token_ids"]).tolist())
        logprobs = tuple(_decoded(row["logprobs"]).tolist())
        versions = tuple(version for version, count in row["weight_versions"] for _ in range(count))
        experts = row["routed_experts"]
        completion = Completion(
            tuple(_decoded(row["prompt_ids"]).tolist()),
            token_ids,
            logprobs,
            row["finish_reason"],
            versions,
            None if experts is None else _decoded(experts).astype(experts["dtype"]),
        )
        key = str(row["key"])
    except (KeyError, TypeError, ValueError):
        return None
    is_whole = len(logprobs) == len(token_ids) and len(versions) in (0, len(token_ids))
    return Recorded(key, completion) if is_whole else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of `path`, one after another; none if there is no file. A line that a kill or a bad disk left damaged,
    the last one without its end included, is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            row = parse(line) if line.endswith(b"\n") else None
            if row is not None:
                yield row


def completions(rows: Iterable[Mapping[str, Any]]) -> list[Recorded]:
    """Those of `rows` that hold one, in the order in which they landed."""
    return [recorded for row in rows if (recorded := from_row(row)) is not None]


def _experts(array: np.ndarray) -> dict[str, Any]:
    """Coded in the narrowest unsigned type that holds them, with the type they had."""
    if array.size and array.min() >= 0:
        return _coded(array.astype(np.min_scalar_type(int(array.max())))) | {"dtype": array.dtype.str}
    return _coded(array) | {"dtype": array.dtype.str}


def _coded(array: np.ndarray) -> dict[str, Any]:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    coded = {"as": little.dtype.str, "data": base64.b64encode(np.ascontiguousarray(little).tobytes()).decode("ascii")}
    return coded if array.ndim == 1 else coded | {"shape": list(array.shape)}


def _decoded(coded: Mapping[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(coded["data"], validate=True), dtype=coded["as"])
    return flat.reshape(coded["shape"]) if "shape" in coded else flat
