"""Saved tokens scored again by the trainer's model, in its own way or in another that an engine might have had.

Takes completions of `journal/` and the weights that a run directory still has; gives log-probs. A way of scoring is a
`Reading`, so that ways can be combined. Every rank of the layout takes part; data-parallel ranks do the same twice.

Shapes: T packed tokens of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_pz.batch.samples import sample_of
from megatron_pz.batch.schedule import plan_update
from megatron_pz.checkpoint.hf_import import load_hf_weights
from megatron_pz.checkpoint.store import load_weights
from megatron_pz.config.schema import Config
from megatron_pz.models.folder import read_hf_config, resolve_folder
from megatron_pz.models.policy_model import PolicyModel
from megatron_pz.models.random_init import initialize
from megatron_pz.models.registry import family
from megatron_pz.models.rope import RopeScaling
from megatron_pz.models.shards import unwrap
from megatron_pz.platform.base import Platform, torch_dtype
from megatron_pz.train.deal import divisors
from megatron_pz.train.forward import LOG_PROBS, scored_rows
from megatron_pz.train.model import build_model
from megatron_pz.train.parallel import Parallel
from megatron_pz.types import Completion, MicroBatch

Dtype = Literal["float32", "bfloat16"]
Rounded = Literal["", "norms", "head", "all"]


@dataclass(frozen=True)
class Reading:
    """A way to score. The defaults are a float32 trainer's."""

    temperature: float = 1.0
    top_p: float = 1.0  # log-probs are those of the nucleus, renormalised; 1.0: of the whole vocabulary
    dtype: Dtype = "float32"  # of weights and layers
    head_dtype: Dtype | None = None  # of the product that gives logits; None: `dtype`
    rounded: Rounded = ""  # weights that are rounded to bfloat16 and back
    rope: tuple[float, RopeScaling | None] | None = None  # base and scaling; None: those of config.json
    replays_routing: bool = False  # tokens go to the experts that the engine told
    # The policy that learns; the one that each token is stamped with; the one before that.
    weights: Literal["learner", "stamps", "before"] = "learner"
    has_stale_prefix: bool = False  # keys and values of a shared prefix are those of the version before

    @staticmethod
    def of(config: Config) -> Reading:
        """The trainer's own, under the settings of a run."""
        return Reading(
            temperature=config.engine.temperature or 1.0,
            dtype=config.model.params_dtype,
            replays_routing=config.train.routing_replay,
        )


@dataclass(frozen=True, eq=False)
class SavedRound:
    """Completions of one step, packed."""

    step: int
    version: int  # of the policy that learned from them
    batches: tuple[MicroBatch, ...]
    stamps: tuple[np.ndarray, ...]  # int64 [T] a micro-batch: version that sampled the token predicted there; -1: none
    prefixes: tuple[np.ndarray, ...]  # bool [T]: tokens that earlier requests began with too

    @property
    def stamped(self) -> set[int]:
        """Versions that its tokens come from."""
        return {int(stamp) for row in self.stamps for stamp in np.unique(row[row >= 0])}

    @property
    def has_experts(self) -> bool:
        return any(batch.routed_experts is not None for batch in self.batches)

    @property
    def has_prefixes(self) -> bool:
        return any(bool(row.any()) for row in self.prefixes)


def pack(
    step: int, version: int, answers: Sequence[Completion], earlier: Sequence[Completion], config: Config
) -> SavedRound:
    """The round of `step`, ready to be scored.

    Args:
        version: of the policy that learned from it.
        answers: of the round, each with at least one token.
        earlier: of earlier rounds; what a prompt shares with one of them from its beginning on may have come from the cache.
    """
    samples = [sample_of(answer, role=None, group_id=str(place)) for place, answer in enumerate(answers)]
    layout = divisors(config)
    plan = plan_update(
        samples,
        max_tokens=config.train.max_tokens_per_micro_batch,
        align=layout["align"],
        count_multiple=layout["count_multiple"],
    )
    before = sorted((*answer.prompt_ids, *answer.token_ids) for answer in earlier)
    stamps, prefixes = [], []
    for batch in plan.micro_batches[0]:
        stamp, prefix = np.full(batch.num_tokens, -1, np.int64), np.zeros(batch.num_tokens, np.bool_)
        for start, place in zip(batch.cu_seqlens, batch.sample_indices, strict=False):
            if place < 0:
                continue
            answer = answers[place]
            first = int(start) + len(answer.prompt_ids) - 1
            versions = [version if v < 0 else v for v in answer.weight_versions] or [version] * len(answer.token_ids)
            stamp[first : first + len(versions)] = versions
            # A server computes the last token of a prompt in any case.
            prefix[start : start + min(_shared(answer.prompt_ids, before), len(answer.prompt_ids) - 1)] = True
        stamps.append(stamp)
        prefixes.append(prefix)
    return SavedRound(step, version, plan.micro_batches[0], tuple(stamps), tuple(prefixes))


def _shared(prompt: Sequence[int], before: Sequence[tuple[int, ...]]) -> int:
    """Most tokens that `prompt` begins with as one of `before` does, which is sorted: its neighbours there share most."""
    at = bisect(before, tuple(prompt))
    shared = 0
    for other in before[max(at - 1, 0) : at + 1]:
        same = 0
        while same < min(len(prompt), len(other)) and prompt[same] == other[same]:
            same += 1
        shared = max(shared, same)
    return shared


class Rescorer:
    """The model of a run, under any `Reading`.

    Args:
        config: settings of the run; the layout may be another, without context parallelism.
        versions: checkpoint of each policy version that there is; None: what the run began with.
    """

    def __init__(
        self, config: Config, versions: Mapping[int, Path | None], platform: Platform, parallel: Parallel
    ) -> None:
        self.config, self.versions, self.platform, self.parallel = config, versions, platform, parallel
        self.folder = resolve_folder(config.model.hf_model)
        self.hf_config = read_hf_config(self.folder)
        self._models: dict[Dtype, list[DistributedDataParallel]] = {}
        self._loaded: dict[Dtype, tuple[int, Rounded]] = {}

    def gaps(self, played: SavedRound, reading: Reading) -> np.ndarray:
        """Trainer's log-prob less engine's of every response token of the round, in nats: float64 [response tokens]."""
        scored = [np.zeros(batch.num_tokens, np.float64) for batch in played.batches]
        for version, is_scored in self._by_version(played, reading):
            rows = self._score(played, reading, version)
            for into, row, mask in zip(scored, rows, is_scored, strict=True):
                into[mask] = row[mask]
        parts = [
            (into - batch.rollout_log_probs)[batch.loss_weights > 0]
            for into, batch in zip(scored, played.batches, strict=True)
        ]
        return np.concatenate(parts)

    @staticmethod
    def used_versions(played: SavedRound, reading: Reading) -> set[int]:
        """Versions whose weights `gaps` takes."""
        behind = int(reading.weights == "before")
        stamps = {played.version} if reading.weights == "learner" else played.stamped
        used = {max(stamp - behind, 0) for stamp in stamps}
        return used | ({version - 1 for version in used if version} if reading.has_stale_prefix else set())

    def _by_version(self, played: SavedRound, reading: Reading) -> Iterator[tuple[int, list[np.ndarray]]]:
        if reading.weights == "learner":
            yield played.version, [row >= 0 for row in played.stamps]
            return
        for stamp in sorted(played.stamped):
            yield max(stamp - int(reading.weights == "before"), 0), [row == stamp for row in played.stamps]

    def _score(self, played: SavedRound, reading: Reading, version: int) -> list[np.ndarray]:
        if not (reading.has_stale_prefix and version):
            return self._forward(played, reading, version)
        with _RememberedKeys(self._chunks(reading.dtype), played.prefixes) as keys:
            self._forward(played, reading, version - 1)
            keys.recall()
            return self._forward(played, reading, version)

    def _forward(self, played: SavedRound, reading: Reading, version: int) -> list[np.ndarray]:
        chunks = self._chunks(reading.dtype)
        self._load(chunks, reading, version)
        with ExitStack() as changed:
            for chunk in chunks:
                changed.enter_context(_changed(unwrap(chunk), reading))
            return scored_rows(
                chunks,
                played.batches,
                LOG_PROBS,
                self.platform,
                temperature=reading.temperature,
                replays_routing=reading.replays_routing,
            )

    def _chunks(self, dtype: Dtype) -> list[DistributedDataParallel]:
        if dtype not in self._models:
            config = self.config
            config = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, params_dtype=dtype),
                train=dataclasses.replace(config.train, routing_replay=self.is_moe),
            )
            self._models[dtype] = build_model(self.hf_config, config, self.platform, self.parallel)
        return self._models[dtype]

    @property
    def is_moe(self) -> bool:
        """Whether the model has experts."""
        return any(family(self.hf_config).is_moe_layer(self.hf_config))

    def _load(self, chunks: list[DistributedDataParallel], reading: Reading, version: int) -> None:
        if self._loaded.get(reading.dtype) == (version, reading.rounded):
            return
        model, begun = self.config.model, self.config.checkpoint.load
        checkpoint = self.versions[version] or (Path(begun) if begun else None)
        if checkpoint is not None:
            load_weights(chunks, checkpoint, self.parallel.control_group)
        elif model.init == "pretrained":
            load_hf_weights(chunks, self.folder)
        else:
            for chunk in chunks:
                initialize(unwrap(chunk), self.config.train.seed)
        for chunk in chunks:
            _round_weights(unwrap(chunk), reading.rounded)
        self._loaded[reading.dtype] = (version, reading.rounded)


@torch.no_grad()
def _round_weights(model: PolicyModel, which: Rounded) -> None:
    head = "word_embeddings" if model.share_embeddings_and_output_weights else "output_layer"
    words = {"norms": "norm", "head": head, "all": ""}
    for name, parameter in model.named_parameters() if which else ():
        if words[which] in name:
            parameter.copy_(parameter.to(torch.bfloat16))


@contextmanager
def _changed(model: PolicyModel, reading: Reading) -> Iterator[None]:
    """Within the block `model` has the rotary embedding and the head of `reading`."""
    rotary = model.rotary_pos_emb
    try:
        if reading.rope is not None:
            model.rotary_pos_emb = model.rotary(*reading.rope)
        if reading.top_p < 1 or reading.head_dtype is not None:
            model.head = _head(model, reading)  # type: ignore[method-assign]
        yield
    finally:
        model.rotary_pos_emb = rotary
        model.__dict__.pop("head", None)


def _head(model: PolicyModel, reading: Reading) -> Callable[..., tuple[Tensor, Tensor]]:
    """`PolicyModel.head` with logits of another precision, or of the nucleus only; entropies are 0."""
    dtype = torch_dtype(reading.head_dtype or reading.dtype)

    def head(hidden: Tensor, labels: Tensor, wanted: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        found = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        places = (labels >= 0).nonzero().squeeze(1) if wanted is None else wanted
        weight = model.head_weight().to(dtype)
        for at in places.split(model.chunk_tokens):
            logits = F.linear(hidden.squeeze(1).index_select(0, at).to(dtype), weight)
            logits = gather_from_tensor_model_parallel_region(logits, group=model.pg_collection.tp)
            every = (logits[:, : model.tensor_shape.vocab_size].float() / temperature).log_softmax(-1)
            if reading.top_p < 1:
                every = every - nucleus_mass(every, reading.top_p).log()[:, None]
            found[at] = every.gather(1, labels[at][:, None])[:, 0]
        return found, torch.zeros_like(found)

    return head


def nucleus_mass(log_probs: Tensor, top_p: float) -> Tensor:
    """Probability of the fewest likeliest that together have at least `top_p`: [n] of `log_probs`, floating [n, V].

    >>> nucleus_mass(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.6)
    tensor([0.8000])
    """
    ordered = log_probs.exp().sort(dim=-1, descending=True).values
    is_before = ordered.cumsum(-1) - ordered < top_p
    return (ordered * is_before).sum(-1)


class _RememberedKeys:
    """Keys and values of one forward put in place of the next one's, at some tokens.

    Args:
        where: bool [T] a micro-batch, in the order of the forwards.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], where: Sequence[np.ndarray]) -> None:
        self._attentions = [
            layer.self_attention.core_attention for chunk in chunks for layer in unwrap(chunk).decoder.layers
        ]
        self._where = [torch.from_numpy(row) for row in where]
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._turn: dict[int, int] = defaultdict(int)
        self._recalls = False
        self._hooks: list[Any] = []

    def __enter__(self) -> _RememberedKeys:
        self._hooks = [attention.register_forward_pre_hook(self._call) for attention in self._attentions]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def recall(self) -> None:
        """The next forward is the one that is changed."""
        self._recalls = True

    def _call(self, attention: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        query, key, value, *rest = args
        mine = self._kept[id(attention)]
        if not self._recalls:
            mine.append((key, value))
            return None
        turn = self._turn[id(attention)]
        self._turn[id(attention)] += 1
        is_old = self._where[turn].to(key.device)[:, None, None]
        old_key, old_value = mine[turn]
        return (query, torch.where(is_old, old_key, key), torch.where(is_old, old_value, value), *rest)
