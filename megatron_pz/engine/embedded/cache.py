"""Keys and values of prompts and of responses, apart: a prompt is held once, however many rows answer it.

1. Prompt slots are 0 to num_prompts - 1 and rows 0 to num_rows - 1, without holes: who leaves is replaced by the last.
2. A prefill computes only what no earlier prompt has: a prompt that begins like its parent takes those keys over.
3. A cache lives for one batch of requests, so no key outlives the weights that made it.

Shapes: T tokens of one forward, P prompt slots, R rows, G key heads of this rank, D head size, L length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_pz.engine.embedded.attention import attend_part, merge


class Store:
    """One tensor pair [slots, G, L, D] a layer, grown by doubling."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots = self.length = 0

    def reserve(self, slots: int, length: int) -> None:
        """Make room for so many slots of so many tokens; what is stored stays."""
        if slots <= self.slots and length <= self.length:
            return
        if slots > self.slots:
            self.slots = max(slots, min(2 * self.slots, self.slots + 256))
        if length > self.length:
            self.length = -(-max(length, min(2 * self.length, self.length + 512)) // 16) * 16
        for layer, pair in self.layers.items():
            self.layers[layer] = (self._grown(pair[0]), self._grown(pair[1]))

    def of(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; made on first use with heads, size and dtype of `like` [..., G, D]."""
        if layer not in self.layers:
            shape = (self.slots, like.shape[-2], self.length, like.shape[-1])
            # Zeros, since a value that is weighted with 0 must still be finite.
            self.layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[layer]

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens of the slots `sources` over those of `targets`."""
        for pair in self.layers.values():
            for tensor in pair:
                source, target = (torch.tensor(slots, device=tensor.device) for slots in (sources, targets))
                tensor[target, :, :length] = tensor[source, :, :length]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros((self.slots, old.shape[1], self.length, old.shape[3]))
        new[: old.shape[0], :, : old.shape[2]] = old
        return new


@dataclass(frozen=True, slots=True)
class Piece:
    """What a prefill computes of one prompt: its tokens from `shared` on."""

    slot: int
    parent: int  # the slot whose first `shared` keys it takes over; any if `shared` is 0
    shared: int
    length: int  # of the whole prompt


class PrefillPlan:
    """Pieces that lie end to end in one forward."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self.pieces = pieces
        self.masks = [_tail_mask(piece, device) if piece.shared else None for piece in pieces]


def _tail_mask(piece: Piece, device: torch.device) -> Tensor:
    """bool [tail, length]: token shared + i sees the first shared + i + 1 keys."""
    size = (piece.length - piece.shared, piece.length)
    return torch.ones(size, dtype=torch.bool, device=device).tril(piece.shared)


def _bias(lengths: Tensor, longest: int) -> Tensor:
    """float32 [n, 1, 1, longest]: 0 on the first `lengths` [n] places, -inf behind."""
    beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return torch.zeros(beyond.shape, device=lengths.device).masked_fill_(beyond, -torch.inf)[:, None, None]


class DecodePlan:
    """One new token for each row, and where its keys are. The prompt of a row has a seat for each of its rows.

    Args:
        prompt_slots: of each row.
        prompt_lengths: of each prompt slot.
    """

    def __init__(self, prompt_slots: Sequence[int], prompt_lengths: Sequence[int], device: torch.device) -> None:
        self.num_rows, self.num_prompts = len(prompt_slots), len(prompt_lengths)
        self.longest_prompt = max(prompt_lengths)
        rows_of: list[list[int]] = [[] for _ in prompt_lengths]
        places = []
        for row, slot in enumerate(prompt_slots):
            places.append(len(rows_of[slot]))
            rows_of[slot].append(row)
        self.num_seats = max(map(len, rows_of))
        # An empty seat is computed for row 0 and its result not used.
        seats = [row for rows in rows_of for row in (*rows, *[0] * (self.num_seats - len(rows)))]
        self.row_of_seat = torch.tensor(seats, device=device)  # [P * seats]
        back = [slot * self.num_seats + place for slot, place in zip(prompt_slots, places, strict=True)]
        self.seat_of_row = torch.tensor(back, device=device)  # [R]
        self.prompt_bias = _bias(torch.tensor(prompt_lengths, device=device), self.longest_prompt)
        self.starts = torch.tensor([prompt_lengths[slot] for slot in prompt_slots], device=device)
        self._rows = torch.arange(self.num_rows, device=device)

    def at(self, written: Sequence[int]) -> Tensor:
        """Aim at the next token of every row, which has `written` tokens so far; their positions, int64 [R]."""
        self.written = torch.tensor(written, device=self._rows.device)
        self.longest_row = max(written) + 1
        self.row_bias = _bias(self.written + 1, self.longest_row)
        self._targets: tuple[int, int, Tensor] | None = None
        return self.starts + self.written

    def targets(self, groups: int, length: int) -> Tensor:
        """Where the new keys go in a store [rows, groups, length, D] seen as [rows * groups * length, D]: int64 [R * groups]."""
        if self._targets is None or self._targets[:2] != (groups, length):
            heads = self._rows[:, None] * groups + torch.arange(groups, device=self._rows.device)
            self._targets = (groups, length, (heads * length + self.written[:, None]).flatten())
        return self._targets[2]


class SharedPromptCache:
    """Answers for attention while a `plan` is set. Implements `platform.cpu_layers.KeyValueCache`."""

    def __init__(self) -> None:
        self.prompts, self.rows = Store(), Store()
        self.plan: PrefillPlan | DecodePlan | None = None

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the new keys and values and return the attention output of the new tokens.

        Args:
            layer_index: of the layer in the whole model.
            query: [s, 1, query heads, D], rotary embedding applied; tokens as the plan says, then any padding.
            key: [s, 1, G, D]; value likewise.

        Returns:
            [s, 1, query heads * D] in the dtype of `value`, zeros at the padding.
        """
        assert self.plan is not None, "a forward with a cache needs a plan"
        answer = self._prefill if isinstance(self.plan, PrefillPlan) else self._decode
        output = answer(self.plan, layer_index, query[:, 0], key[:, 0], value[:, 0])  # type: ignore[arg-type]
        padding = query.shape[0] - output.shape[0]
        if padding:
            output = F.pad(output, (0, 0, 0, padding))
        return output[:, None]

    def _prefill(self, plan: PrefillPlan, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Output [T, heads * D] of the pieces, each attending to its whole prompt up to itself."""
        keys, values = self.prompts.of(layer, key)
        outputs, start = [], 0
        for piece, mask in zip(plan.pieces, plan.masks, strict=True):
            end = start + piece.length - piece.shared
            for stored, new in ((keys, key), (values, value)):
                stored[piece.slot, :, : piece.shared] = stored[piece.parent, :, : piece.shared]
                stored[piece.slot, :, piece.shared : piece.length] = new[start:end].transpose(0, 1)
            k, v = (stored[piece.slot, :, : piece.length][None] for stored in (keys, values))
            q = query[start:end].transpose(0, 1)[None]
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            outputs.append(output[0].transpose(0, 1).flatten(1))
            start = end
        return torch.cat(outputs)

    def _decode(self, plan: DecodePlan, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Output [R, heads * D] of one token a row."""
        n, p, (groups, dim) = plan.num_rows, plan.num_prompts, key.shape[1:]
        q = query[:n].reshape(n, groups, -1, dim)  # query heads of one group see the same keys
        keys, values = self.rows.of(layer, key)
        at = plan.targets(groups, self.rows.length)
        keys.view(-1, dim).index_copy_(0, at, key[:n].reshape(-1, dim))
        values.view(-1, dim).index_copy_(0, at, value[:n].reshape(-1, dim))
        longest = plan.longest_row
        own = attend_part(q, keys[:n, :, :longest], values[:n, :, :longest], plan.row_bias)

        heads = q.shape[2]
        seated = q.index_select(0, plan.row_of_seat).view(p, -1, groups, heads, dim).transpose(1, 2).flatten(2, 3)
        keys, values = self.prompts.of(layer, key)
        longest = plan.longest_prompt
        output, sums = attend_part(seated, keys[:p, :, :longest], values[:p, :, :longest], plan.prompt_bias)
        output = output.view(p, groups, -1, heads, dim).transpose(1, 2).flatten(0, 1)
        sums = sums.view(p, groups, -1, heads).transpose(1, 2).flatten(0, 1)
        prompt = (output.index_select(0, plan.seat_of_row), sums.index_select(0, plan.seat_of_row))
        return merge(prompt, own).reshape(n, -1)
