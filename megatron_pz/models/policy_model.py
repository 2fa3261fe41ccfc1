"""The policy: Megatron's GPTModel that answers with log-probabilities instead of logits.

Shapes: T packed tokens, H hidden size, V vocabulary of the tokenizer, s new tokens of a decode step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_pz.models.family import Family, HfConfig, ModelFields
from megatron_pz.models.logprobs import LogProbKernel, token_log_probs
from megatron_pz.models.names import TensorShape
from megatron_pz.models.rope import RopeScaling
from megatron_pz.models.rotary import PositionedRotaryEmbedding
from megatron_pz.models.routing_replay import RoutingReplay
from megatron_pz.platform.cpu_layers import KeyValueCache


class PolicyModel(GPTModel):
    """One pipeline stage of the policy. Carries its `family` and `hf_config`, so that weights can be named."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: Any,
        family: Family,
        hf_config: HfConfig,
        fields: ModelFields,
        shape: TensorShape,
        *,
        chunk_tokens: int,
        log_prob_kernel: LogProbKernel = "chunked",
        **stage: Any,
    ) -> None:
        super().__init__(
            config,
            spec,
            vocab_size=shape.padded_vocab_size,
            max_sequence_length=fields.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=fields.rotary_base,
            share_embeddings_and_output_weights=fields.tie_word_embeddings,
            **stage,
        )
        self.family = family
        self.hf_config = dict(hf_config)
        self.tensor_shape = shape
        self.chunk_tokens, self.log_prob_kernel = chunk_tokens, log_prob_kernel
        self.routing_replay: RoutingReplay | None = None
        self.rotary_pos_emb = self.rotary(fields.rotary_base, fields.rope_scaling)

    def rotary(self, base: float, scaling: RopeScaling | None) -> PositionedRotaryEmbedding:
        """A rotary embedding of this model's heads."""
        return PositionedRotaryEmbedding(
            kv_channels=self.config.kv_channels,
            rotary_percent=1.0,
            rotary_base=base,
            use_cpu_initialization=self.config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
            scaling=scaling,
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        labels: Tensor | None = None,
        wanted: Tensor | None = None,
        temperature: float = 1.0,
        logits_at: Tensor | None = None,
        routed_experts: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What this stage knows of the tokens.

        Args:
            input_ids: int64 [1, T].
            position_ids: int64 [1, T]; rotary positions come from `packed_seq_params`, or from `decoding`.
            attention_mask: None, attention is causal.
            packed_seq_params: sequences in the row, from `Platform.packed_seq_params`; None: the row is one sequence.
            labels: int64 [1, T], the token after each; None: logits are wanted.
            wanted: int64 [n], places of the labels that are not below 0; None: they are looked for on the device.
            temperature: logits are divided by it before the log-softmax (with `labels` only).
            logits_at: int64 [n], positions in the row whose logits are wanted; None: all.
            routed_experts: integers [T, layers of this stage with experts, k], from `routing_replay.of_stage`: where the
                tokens go; None: routers choose.

        Returns:
            Stages before the last: hidden states, for the next. Last stage with labels: float32 [2, T], log-probability
            of each label and entropy (no gradient) of its distribution. Last stage without: logits [1, T or n, V], whole
            on every tensor-parallel rank.
        """
        with self._routed(routed_experts):
            hidden = super().forward(
                input_ids, position_ids, attention_mask, packed_seq_params=packed_seq_params, **kwargs
            )
        if not self.post_process:
            return hidden
        hidden = self._whole(hidden)
        if labels is None:
            return self._logits(hidden if logits_at is None else hidden[logits_at])
        return torch.stack(self.head(hidden, labels.squeeze(0), wanted, temperature))

    def head(self, hidden: Tensor, labels: Tensor, wanted: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability of each label (int64 [T]) and entropy of its distribution, from hidden states [T, 1, H] of all tokens."""
        return token_log_probs(
            hidden.squeeze(1),
            self.head_weight(),
            labels,
            temperature=temperature,
            vocab_size=self.tensor_shape.vocab_size,
            chunk_tokens=self.chunk_tokens,
            tp_group=self.pg_collection.tp,
            wanted=wanted,
            kernel=self.log_prob_kernel,
        )

    def _routed(self, experts: Tensor | None) -> AbstractContextManager[None]:
        if self.routing_replay is not None:
            return self.routing_replay.choosing(experts, self.pg_collection.tp)
        assert experts is None, "experts are given to a model without routing_replay"
        return nullcontext()

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states as they are: `forward` has its own head."""
        return hidden_states

    def head_weight(self) -> Tensor:
        """Rows of the output layer on this rank, [padded V / tp, H] of `model.params_dtype`."""
        is_shared = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if is_shared else self.output_layer.weight

    def _whole(self, hidden: Tensor) -> Tensor:
        """All T hidden states on every tensor-parallel rank; their gradients are summed over the ranks' vocabularies."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        return copy_to_tensor_model_parallel_region(hidden, group=group)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [b, s, V] of hidden states [s, b, H]; the vocabulary's padding is cut off."""
        logits = F.linear(hidden, self.head_weight())
        logits = gather_from_tensor_model_parallel_region(logits, group=self.pg_collection.tp)
        return logits[..., : self.tensor_shape.vocab_size].transpose(0, 1)

    @contextmanager
    def decoding(self, cache: KeyValueCache, positions: Tensor) -> Iterator[None]:
        """Within the block every forward adds s new tokens to `cache`, each at its own position.

        Forwards in the block take `input_ids` [1, s] (s tokens of any rows, in the order the cache expects) and no
        `packed_seq_params`.

        Args:
            cache: answers for attention, layer by layer.
            positions: int64 [s] on the model's device.
        """
        attentions = [layer.self_attention.core_attention for layer in self.decoder.layers]
        try:
            self.rotary_pos_emb.positions = positions
            for attention in attentions:
                attention.cache = cache
            yield
        finally:
            self.rotary_pos_emb.positions = None
            for attention in attentions:
                attention.cache = None
