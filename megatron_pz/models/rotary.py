"""Megatron's rotary embedding with a family's scaling, which can be asked for explicit positions while decoding."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_pz.models.rope import RopeScaling, scaled


class PositionedRotaryEmbedding(RotaryEmbedding):
    """Stock while `positions` is None. With `positions` int64 [s] every forward returns the angles of just these
    positions, so that the s new tokens of a decode step may belong to different rows at different places."""

    def __init__(self, *args: Any, scaling: RopeScaling | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inv_freq: Tensor = scaled(self.inv_freq, scaling)
        self.positions: Tensor | None = None

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Angles in radians, float32 [max_seq_len or s, 1, 1, dim]."""
        if self.positions is None:
            return super().forward(max_seq_len, offset=offset, packed_seq=packed_seq, cp_group=cp_group)
        if self.inv_freq.device != self.positions.device:
            self.inv_freq = self.inv_freq.to(self.positions.device)
        angles = torch.outer(self.positions.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
