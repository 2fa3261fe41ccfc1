"""The nouns that travel from the corpus to the gradient. All frozen, each complete when made.

    Paragraph -> (mask prompt) -> Completion -> Mask -> (prediction prompt) -> Completion -> Rollout -> Group -> Sample
              -> MicroBatch -> UpdatePlan

Nothing here imports torch. A stage takes one record and returns another; no stage fills in another's fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


class Role(str, Enum):
    """Which part of the game a response plays. The value is what `rollouts.jsonl` says."""

    GENERATOR = "mask"  # mask generation: reads the paragraph, names the span to hide
    PREDICTOR = "prediction"  # mask prediction: reads the masked paragraph, names the hidden words

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Paragraph:
    """The unit of play. `id` is stable: the same text at the same place of the same corpus has the same id."""

    id: str
    text: str
    title: str = ""
    source: str = ""
    # nats, one a token of the text, under the policy that begins to play; None where the game does not ask for them
    token_entropies: tuple[float, ...] | None = None
    answer: str = ""  # `rlvr`, where the text is a question: the reference answer


@dataclass(frozen=True, slots=True)
class Mask:
    """A span chosen to be hidden.

    Example: ``Mask("leads:7", "Paris", ((23, 28),), "The capital of France is [mask].")``
    """

    paragraph_id: str
    answer: str  # the hidden text, stripped
    spans: tuple[tuple[int, int], ...]  # (start, end) in characters of the paragraph, each hidden
    masked_text: str  # the paragraph with every span replaced by `[mask]`
    num_occurrences: int = 1  # of the answer in the paragraph, hidden or not


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one response is drawn. `top_k` 0 and `top_p` 1.0 mean off; log-probs are reported after temperature."""

    max_new_tokens: int
    temperature: float = 1.0  # 0.0 = greedy; log-probs are then those of temperature 1
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()  # the stop token is part of the response and has a log-prob
    seed: int = 0  # the response is a function of (weights, prompt_ids, params); batching does not enter


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns: ids in, ids out. Engines never see text."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]  # the response, stop token included
    logprobs: tuple[float, ...]  # one a response token: natural log, after temperature, before top-p/top-k
    finish_reason: FinishReason
    weight_versions: tuple[int, ...] = ()  # one a response token: the policy version that sampled it
    routed_experts: Any = None  # MoE: int [all tokens but the last, layers, top_k], or None where not asked for


class Generate(Protocol):
    """One prompt in, one sampled completion out. Requests with equal `prompt_ids` share their prefill."""

    async def __call__(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion: ...


class Encoder(Protocol):
    """The half of a tokenizer that measures text."""

    vocab_size: int  # largest id + 1
    eos_token_ids: tuple[int, ...]  # every id that ends a response

    def encode(self, text: str) -> list[int]: ...


class Tokenizer(Encoder, Protocol):
    """What the game and the tasks need of a tokenizer. Made by `corpus.tokenizer.load_tokenizer`."""

    bos_token_ids: tuple[int, ...]  # what the tokenizer puts in front of a text; mostly nothing. `encode` leaves it out

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; the end tokens in `eos_token_ids` are left out, other special tokens are kept."""
        ...

    def apply_chat(self, user: str) -> list[int]:
        """Ids of one user turn with the generation prompt (the tokenizer's own chat template)."""
        ...


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response of one role, read and paid."""

    role: Role
    paragraph_id: str
    group_id: str  # of the rollouts that share a prompt and a baseline
    mask_id: str  # a mask rollout's own id, and the id of the mask that a prediction is for
    prompt: str  # text of the prompt as tokenised
    response: str  # text of the response, end tokens left out
    completion: Completion
    answer: str | None  # what was parsed out of the response
    target: str | None  # predictions: the hidden text; mask rollouts: None
    valid: bool  # mask rollouts: the span can be hidden; predictions: a box was found
    reject_reason: str | None  # of an invalid one: game.spans.MASK_REJECT_REASONS; predictions: no_box, unverified
    reward: float
    mask: Mask | None = None  # valid mask rollouts and every prediction


@dataclass(frozen=True, slots=True)
class Group:
    """Rollouts that share a baseline, with their advantages. `trained` is false where the group was dropped."""

    id: str
    role: Role
    rollouts: tuple[Rollout, ...]
    advantages: tuple[float, ...]
    trained: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence made trainable. All per-token fields have the length of `token_ids` and speak of that token.

    Example (prompt of 2, response of 2): ``token_ids=(5, 9, 7, 1) loss_weights=(0, 0, 1, 1)
    rollout_log_probs=(0, 0, -0.3, -0.1) advantage=1.2``
    """

    token_ids: tuple[int, ...]
    loss_weights: tuple[float, ...]  # 0 = not trained; this is the loss mask and the weight in one
    rollout_log_probs: tuple[float, ...]  # by the engine that sampled; 0 where not trained or unknown
    advantage: float
    role: Role | None  # None: supervised text
    group_id: str
    # MoE, int16 [len(token_ids) - 1, layers, top_k]: the experts that the engine chose; None: not known
    routed_experts: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Packed sequences, what one forward sees. T packed tokens, S sequences.

    Position t of `labels`, `loss_weights`, `advantages`, `rollout_log_probs`, `is_generator` speaks of the token that
    follows t **in the same sequence** (the token predicted at t); at the last position of a sequence, and in the padding that
    a sequence may end in, they are 0.
    Weights are scaled over the whole step so that they add up to `UpdatePlan.num_tokens` (see there).
    """

    token_ids: np.ndarray  # int64 [T]
    position_ids: np.ndarray  # int64 [T], restarting at 0 in each sequence
    cu_seqlens: np.ndarray  # int32 [S + 1], cumulative lengths, padding included, first 0, last T
    labels: np.ndarray  # int64 [T]
    loss_weights: np.ndarray  # float32 [T], 0 = not trained
    advantages: np.ndarray  # float32 [T]
    rollout_log_probs: np.ndarray  # float32 [T]
    is_generator: np.ndarray  # bool [T], the role of the token's sequence
    sample_indices: tuple[int, ...]  # index of each packed sequence in the step's list of samples; -1 = padding
    # MoE, int16 [T, layers, top_k]: experts of the token **at** t in each layer of the model, dense ones included; -1: the
    # trainer's own choice, as at the last position of a sequence, in padding, and where a sample has none. None: none has.
    routed_experts: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Packed tokens T, padding included."""
        return int(self.token_ids.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class UpdatePlan:
    """All micro-batches of one optimizer update, by data-parallel rank; every rank has equally many.

    The update's loss is ``sum over all tokens of loss_weights * token_loss / num_tokens`` and the weights add up to
    `num_tokens`, whatever the aggregation mode, layout and packing.
    """

    micro_batches: tuple[tuple[MicroBatch, ...], ...]  # [data-parallel rank][micro-batch]
    num_tokens: int  # trained tokens (loss weight > 0) over all ranks and micro-batches
    num_samples: int


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What one optimizer update did. Equal on every rank. `metrics` holds names of `report.metrics`."""

    applied: bool  # False: nothing to learn from (no informative group)
    loss: float
    grad_norm: float
    lr: float
    metrics: Mapping[str, float] = field(default_factory=dict)
