"""How interleaved pipeline stages talk about micro-batches of different lengths.

1. Megatron-Core has a stage tell the length before it sends the tensor, and wait for the lengths of both directions before
   it goes on to the tensors of either: where there are few micro-batches, two stages wait for each other for ever. Here
   nothing is told: the stages have the same micro-batches, and the schedule says which one comes next.
2. Of two stages each is before and behind the other. Megatron-Core tells hidden states and gradients, which then go
   between the same ranks, apart by their order alone, and sends them in another order than they are waited for. (It asks
   for three stages, or for `overlap_p2p_comm`.) Here what goes onward and what comes back have a group each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


class InterleavedCommunicator(P2PCommunicator):
    """Megatron's, for one run of its interleaved schedule.

    Args:
        group: the pipeline.
        config: Megatron's.
        num_tokens: of each micro-batch, as one stage sends it to the next.
        device: where tensors are received.
    """

    def __init__(self, group: dist.ProcessGroup, config: Any, num_tokens: Sequence[int], device: torch.device) -> None:
        super().__init__(group, config)
        self.device = device
        onward, back = received(
            get_schedule_table(
                len(num_tokens),
                config.virtual_pipeline_model_parallel_size,
                config.microbatch_group_size_per_vp_stage,
            ),
            is_first=group.rank() == 0,
            is_last=group.rank() == group.size() - 1,
        )
        self._onward, self._back = ((num_tokens[index] for index in order) for order in (onward, back))

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int] | None, list[int] | None]:
        """Shapes of what comes from the stage before and from the one behind."""
        hidden = self.config.hidden_size
        return (
            [next(self._onward), 1, hidden] if recv_prev else None,
            [next(self._back), 1, hidden] if recv_next else None,
        )

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> Any:
        """(hidden states from the stage before, gradients from the one behind, requests under way), None where there are none."""
        sent = {"tensor_send_next": tensor_send_next, "tensor_send_prev": tensor_send_prev}
        if self.pp_group.size() > 2 or not self.config.batch_p2p_comm:
            asked = {"recv_prev": recv_prev, "recv_next": recv_next, "tensor_shape": tensor_shape}
            return super()._communicate(**sent, **asked, wait_on_reqs=wait_on_reqs)
        hidden, gradient = (
            None
            if shape is None
            else torch.empty(shape, dtype=self.config.pipeline_dtype, device=self.device, requires_grad=True)
            for shape in self._communicate_shapes(tensor_send_next, tensor_send_prev, recv_prev, recv_next)
        )
        requests = []
        for group, ops in (
            (self.pp_group, ((dist.isend, tensor_send_next, self.next_rank), (dist.irecv, hidden, self.prev_rank))),
            (
                dist.group.WORLD,
                ((dist.isend, tensor_send_prev, self.prev_rank), (dist.irecv, gradient, self.next_rank)),
            ),
        ):
            wanted = [dist.P2POp(op, tensor, rank, group) for op, tensor, rank in ops if tensor is not None]
            requests += dist.batch_isend_irecv(wanted) if wanted else []
        for request in requests:
            request.wait()
        return hidden, gradient, None


def received(table: Sequence[tuple[int, int]], *, is_first: bool, is_last: bool) -> tuple[list[int], list[int]]:
    """Micro-batches in the order in which a stage receives their hidden states, and their gradients.

    The first stage receives from the last what that has not finished: all but its last chunk's. Gradients go the other way.

    Args:
        table: of Megatron's schedule, (micro-batch, chunk) in the order in which a stage takes them forward; backward, chunks
            come in the opposite order.

    >>> table = [(0, 0), (1, 0), (0, 1), (1, 1)]
    >>> received(table, is_first=True, is_last=False), received(table, is_first=False, is_last=True)
    (([0, 1], [0, 1, 0, 1]), ([0, 1, 0, 1], [0, 1]))
    """
    last_chunk = max(chunk for _, chunk in table)
    unfinished = [index for index, chunk in table if chunk != last_chunk]
    everything = [index for index, _ in table]
    return unfinished if is_first else everything, unfinished if is_last else everything


def interleaved(config: Any, num_tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Arguments of Megatron's interleaved schedule that have stages talk as above.

    Args:
        config: Megatron's, of the first chunk.
        num_tokens: of each micro-batch, in the whole row.
        device: of the chunks.
    """
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    sharers = groups.cp.size() * (groups.tp.size() if config.sequence_parallel else 1)
    sent = [tokens // sharers for tokens in num_tokens]
    return {"p2p_communicator": InterleavedCommunicator(groups.pp, config, sent, device), "pg_collection": groups}
