"""The trainer's own model as the embedded engine's decoder, and the engine made from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_pz.config.schema import EngineConfig
from megatron_pz.engine.embedded.cache import SharedPromptCache
from megatron_pz.engine.embedded.engine import EmbeddedEngine
from megatron_pz.engine.embedded.ranks import ProcessRanks
from megatron_pz.errors import EngineError
from megatron_pz.models.shards import complete_weights, unwrap


class PolicyDecoder:
    """Feeds a whole policy (one pipeline stage) token by token. Implements `engine.embedded.engine.Model`.

    Args:
        chunks: of the trainer, wrapped or not.

    Raises:
        EngineError: the model is cut into pipeline stages.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.load(chunks)
        config = self.policy.config
        self.vocab_size = self.policy.tensor_shape.vocab_size
        self.max_positions = int(self.policy.max_sequence_length)
        # Under sequence parallelism every rank of the group takes an equal part of the tokens.
        self._multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.policy.parameters()).device

    def load(self, weights: Sequence[Any]) -> None:
        """Decode with these chunks. Nothing is copied: what the optimizer has written is what samples."""
        policies = [unwrap(chunk) for chunk in weights]
        if len(policies) != 1 or not (policies[0].pre_process and policies[0].post_process):
            size = policies[0].config.pipeline_model_parallel_size
            raise EngineError(
                f"parallel.pipeline_model_parallel_size is {size}; the embedded engine samples from whole models, so it "
                'must be 1, or set engine = "sglang".'
            )
        complete_weights(weights)
        self.policy = policies[0]

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Evaluation mode and no autograd graph within the block.

        (`torch.inference_mode` would be a little faster, but Megatron keeps communication buffers for re-use, and one
        that is made in it cannot be written to by the training forward.)
        """
        was_training = self.policy.training
        self.policy.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.policy.train(was_training)

    def logits(self, cache: SharedPromptCache, token_ids: Tensor, positions: Tensor, wanted: Tensor | None) -> Tensor:
        """Logits [n, V] after the tokens `wanted`, in the model's dtype; see `engine.embedded.batch.Decoder`."""
        size = token_ids.shape[0]
        padding = -size % self._multiple
        if padding:
            token_ids, positions = F.pad(token_ids, (0, padding)), F.pad(positions, (0, padding))
            wanted = torch.arange(size, device=token_ids.device) if wanted is None else wanted
        with self.policy.decoding(cache, positions):
            return self.policy(token_ids[None], positions[None], logits_at=wanted)[0]


def embedded_engine(chunks: Sequence[torch.nn.Module], config: EngineConfig) -> EmbeddedEngine:
    """The engine over the trainer's chunks. Collective: every rank makes its own. Weights come with the first `load`.

    Raises:
        EngineError: the model is cut into pipeline stages.
    """
    decoder = PolicyDecoder(chunks)
    ranks = ProcessRanks(_partners()) if dist.is_initialized() and dist.get_world_size() > 1 else None
    return EmbeddedEngine(decoder, config.max_running_requests, ranks)


def _partners() -> Iterable[int]:
    """Ranks that this rank's forwards communicate with."""
    groups: list[Any] = [
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_expert_tensor_and_model_parallel_group(),
    ]
    return {rank for group in groups for rank in dist.get_process_group_ranks(group)}
