"""Train each token on the experts that the server chose for it, with the trainer's own probabilities for them.

Two engines that differ in the last bits choose other experts for some tokens, and then differ by far more than bits. Here
the choice is given from outside, and the gradient flows through the router's scores of the chosen as ever. Source: rollout
routing replay (R3), Ma et al., "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers", 2025.

Megatron's router asks an object at `router.router_replay` for its choice, if there is one. Ours stands there instead of
Megatron's own `RouterReplay`, which has one choice for all tokens or none, keeps every router of the process in one list,
and has to be told before each forward and each recomputation which of them comes next (docs/decisions/0004).

Shapes: T packed tokens, L layers of the whole model, M layers with experts in this pipeline stage, k experts a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_pz.errors import ConfigError, EngineError

UNKNOWN = -1
"""In place of an expert: the router chooses for itself."""

TopK = Callable[..., tuple[Tensor, Tensor]]


class GivenChoice:
    """Stands at `router.router_replay` of one router.

    Where activations are recomputed the router is called once more in the backward, when other micro-batches may have gone
    forward in between. Backwards come in the order of the forwards, so choices wait in a queue: a call without gradients
    in a forward that has them is one that will come again.
    """

    def __init__(self) -> None:
        self._given: Tensor | None = None
        self._is_forward = self._has_backward = False
        self._again: deque[Tensor | None] = deque()

    def begin(self, given: Tensor | None) -> None:
        """A forward begins; `given`: integers [tokens of this rank, k], `UNKNOWN` where the choice is free; or None."""
        self._given, self._is_forward, self._has_backward = given, True, torch.is_grad_enabled()

    def end(self) -> None:
        """The forward is over."""
        self._given, self._is_forward = None, False

    def forget(self) -> None:
        """Nothing that went forward so far has a backward to come."""
        self._again.clear()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [tokens, k], with their gradient, and int64 numbers of the chosen experts. Called by Megatron's router.

        Args:
            scores: [tokens, experts], by which the router itself would choose.
            default_compute_topk: how it would.
        """
        assert default_compute_topk is not None, "Megatron hands over the router's own choice"
        given = self._of_this_call()
        if given is None:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        assert given.shape == (scores.shape[0], topk), (
            f"experts of {tuple(given.shape)} for scores {tuple(scores.shape)}"
        )
        with torch.no_grad():
            _, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        chosen = torch.where(given != UNKNOWN, given.to(own.dtype), own)
        return scores.gather(1, chosen), chosen

    def _of_this_call(self) -> Tensor | None:
        if not self._is_forward:
            return self._again.popleft() if self._again else None
        if self._has_backward and not torch.is_grad_enabled():
            self._again.append(self._given)
        return self._given


class RoutingReplay:
    """The routers of a pipeline stage, which choose for themselves outside of `choosing`.

    Args:
        layers: of the stage, those without experts too.
        config: Megatron's.

    Raises:
        ConfigError: the model has no experts, or its routers have no place for a choice from outside.
    """

    def __init__(self, layers: Iterable[Any], config: Any) -> None:
        if not config.num_moe_experts:
            raise ConfigError("train.routing_replay is true, but the model has no experts. Leave it out.")
        if config.moe_router_fusion or config.moe_router_load_balancing_type == "sinkhorn":
            raise ConfigError(
                "train.routing_replay is true, but with transformer.moe_router_fusion or the load balancing 'sinkhorn' "
                "Megatron-Core's router takes no choice from outside. Leave one of them out."
            )
        routers = {layer.layer_number - 1: layer.mlp.router for layer in layers if hasattr(layer.mlp, "router")}
        self.places = sorted(routers)
        """Places of the stage's layers with experts among all layers of the model."""
        self._num_layers, self._topk, self._num_experts = (
            config.num_layers,
            config.moe_router_topk,
            config.num_moe_experts,
        )
        self._is_sharded = bool(config.sequence_parallel)
        self._choices = [GivenChoice() for _ in self.places]
        for place, choice in zip(self.places, self._choices, strict=True):
            if not hasattr(routers[place], "router_replay"):
                raise ConfigError(
                    "train.routing_replay is true, but the router of this Megatron-Core has no `router_replay`; use 0.16.1."
                )
            routers[place].router_replay = choice

    def of_stage(self, experts: np.ndarray) -> np.ndarray:
        """Experts of this stage's layers, [T, M, k].

        Args:
            experts: integers [T, L, k]; `UNKNOWN` k times where the router chooses.

        Raises:
            EngineError: the shape is another model's, or a token's experts are not k different ones that there are.
        """
        if experts.shape[1:] != (self._num_layers, self._topk):
            raise EngineError(
                f"The server tells {experts.shape[2]} experts a token in {experts.shape[1]} layers; the trainer's model has "
                f"{self._topk} in {self._num_layers}. Does the server serve this model?"
            )
        mine = np.ascontiguousarray(experts[:, self.places])
        ordered = np.sort(mine, axis=-1)
        is_wrong = (ordered[..., 0] < 0) | (ordered[..., -1] >= self._num_experts)
        is_wrong |= (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
        is_wrong &= (mine != UNKNOWN).any(axis=-1)
        if is_wrong.any():
            token, layer = np.argwhere(is_wrong)[0]
            raise EngineError(
                f"The server tells experts {mine[token, layer].tolist()} for a token in layer {self.places[layer]}; they must be "
                f"{self._topk} different ones of 0 to {self._num_experts - 1}. Does the server serve this model?"
            )
        return mine

    @contextmanager
    def choosing(self, experts: Tensor | None, tp_group: Any) -> Iterator[None]:
        """Within the block, one forward, tokens go to `experts`.

        Args:
            experts: integers [T, M, k] from `of_stage`, of all T tokens on every rank; None: routers choose.
            tp_group: tensor-parallel group, whose ranks share the tokens out under sequence parallelism.
        """
        if experts is not None and self._is_sharded:
            experts = experts.chunk(tp_group.size())[tp_group.rank()]
        for index, choice in enumerate(self._choices):
            choice.begin(None if experts is None else experts[:, index])
        try:
            yield
        finally:
            for choice in self._choices:
                choice.end()

    def forget(self) -> None:
        """Nothing that went forward so far has a backward to come."""
        for choice in self._choices:
            choice.forget()
