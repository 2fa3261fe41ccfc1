"""Rotary positions: what config.json says of them, and an embedding that can be asked for explicit positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from megatron_pz.errors import ModelError


@dataclass(frozen=True)
class RopeScaling:
    """A change of the rotary frequencies for longer texts. The last three fields are of the kind `llama3`."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def read_rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the `rope_parameters` of newer configs or `rope_theta` and `rope_scaling` of older ones.

    Raises:
        ModelError: the scaling is of a kind that is not known here.
    """
    fields = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    base = float(fields.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScaling("linear", float(fields["factor"]))
    if kind == "llama3":
        return base, RopeScaling(
            "llama3",
            float(fields["factor"]),
            float(fields["low_freq_factor"]),
            float(fields["high_freq_factor"]),
            int(fields["original_max_position_embeddings"]),
        )
    raise ModelError(f"config.json has rotary scaling {kind!r}; megatron_pz knows default, linear and llama3.")


def scaled(inv_freq: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Rotary frequencies after scaling: float32 [dim / 2] of radians a position, same shape out.

    `linear` divides all; `llama3` divides those whose wavelength is long against the original context, keeps the short
    ones and goes linearly, in turns over the original context, between the two.
    """
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return kept * inv_freq + (1 - kept) * inv_freq / scaling.factor
