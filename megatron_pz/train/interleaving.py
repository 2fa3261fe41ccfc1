"""How two interleaved pipeline stages talk.

Of two stages each is before and behind the other, so that hidden states and gradients go between the same two ranks in the
same direction. Megatron-Core tells such messages apart by their order alone, and sends them in another order than they are
waited for: a stage would take the one for the other. (Its own way out, `overlap_p2p_comm`, does not reach the lengths of
micro-batches, which are sent in the same manner.) Here what goes onward and what comes back have a group each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


class TwoStageCommunicator(P2PCommunicator):
    """Megatron's, for a pipeline of two.

    Args:
        device: where tensors are received.
    """

    def __init__(self, group: dist.ProcessGroup, config: Any, device: torch.device) -> None:
        super().__init__(group, config)
        self.device = device

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """(hidden states from the stage before, gradients from the one behind), each None where not asked for.

        Lengths of micro-batches go ahead of them: `tensor_shape` is not looked at.
        """
        sent = (tensor_send_next, tensor_send_prev)
        device = self.device
        shapes = self._exchange(
            *(None if tensor is None else torch.tensor(tensor.shape, device=device) for tensor in sent),
            *(
                torch.empty(3, dtype=torch.int64, device=device) if wanted else None
                for wanted in (recv_prev, recv_next)
            ),
        )
        received = [
            None
            if shape is None
            else torch.empty(shape.tolist(), dtype=self.config.pipeline_dtype, device=device, requires_grad=True)
            for shape in shapes
        ]
        return *self._exchange(*sent, *received), None

    def _exchange(
        self, send_next: Tensor | None, send_prev: Tensor | None, recv_prev: Tensor | None, recv_next: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What was received, once all has come and gone."""
        onward, back = self.pp_group, dist.group.WORLD
        requests = []
        for group, ops in (
            (onward, ((dist.isend, send_next, self.next_rank), (dist.irecv, recv_prev, self.prev_rank))),
            (back, ((dist.isend, send_prev, self.prev_rank), (dist.irecv, recv_next, self.next_rank))),
        ):
            wanted = [dist.P2POp(op, tensor, rank, group) for op, tensor, rank in ops if tensor is not None]
            requests += dist.batch_isend_irecv(wanted) if wanted else []
        for request in requests:
            request.wait()
        return recv_prev, recv_next


def two_stages(config: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of Megatron's interleaved schedule that put `TwoStageCommunicator` in its place; none where it fits.

    Args:
        config: Megatron's, of the first chunk.
        device: of the chunks.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() != 2:
        return {}
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = pipeline
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return {"p2p_communicator": TwoStageCommunicator(pipeline, config, device), "pg_collection": groups}
