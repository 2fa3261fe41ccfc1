"""Records for tests, with every field that a test does not care about already filled in.

from builders import ByteTokenizer, TableEngine, paragraph, rollout
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from megatron_pz.game.advantages import advantages
from megatron_pz.game.filters import is_informative
from megatron_pz.game.masking import MaskRules
from megatron_pz.game.prompts import Template, Templates
from megatron_pz.game.spans import hide_answer
from megatron_pz.types import (
    Completion,
    FinishReason,
    Group,
    Mask,
    Paragraph,
    Role,
    Rollout,
    Sample,
    SamplingParams,
)


class ByteTokenizer:
    """A real tokenizer of 258 ids: one a UTF-8 byte, an end token and an end-of-turn token. Any text survives it."""

    EOS, END_OF_TURN = 256, 257

    def __init__(self, bos_token_ids: tuple[int, ...] = (), has_chat: bool = True) -> None:
        self.vocab_size = 258
        self.eos_token_ids = (self.EOS, self.END_OF_TURN)
        self.bos_token_ids = bos_token_ids
        self.has_chat = has_chat

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def apply_chat(self, user: str) -> list[int]:
        from megatron_pz.errors import TokenizerError

        if not self.has_chat:
            raise TokenizerError("a byte tokenizer built without a chat template; use prompt_style plain")
        return [*self.encode(f"<user>{user}"), self.END_OF_TURN, *self.encode("<assistant>")]


Reply = Callable[[str, SamplingParams], str]


class TableEngine:
    """Answers from a function of (prompt text, params), as an engine would: ids in, ids out, in any landing order.

    Replies end with the end token unless they are over `max_new_tokens`, where they are cut ("length"). `requests`
    lists what was asked, in order; `order` shuffles when responses land.
    """

    def __init__(
        self, reply: Reply, tokenizer: ByteTokenizer | None = None, order: random.Random | None = None
    ) -> None:
        self.reply, self.tokenizer, self.order = reply, tokenizer or ByteTokenizer(), order
        self.requests: list[tuple[str, SamplingParams]] = []

    async def __call__(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        prompt = self.tokenizer.decode(prompt_ids)
        self.requests.append((prompt, params))
        for _ in range(self.order.randrange(4) if self.order else 0):
            await asyncio.sleep(0)
        ids = [*self.tokenizer.encode(self.reply(prompt, params)), self.tokenizer.EOS]
        cut = ids[: params.max_new_tokens]
        reason: FinishReason = "stop" if len(cut) == len(ids) else "length"
        logprobs = tuple(-0.5 for _ in cut)
        return Completion(tuple(prompt_ids), tuple(cut), logprobs, reason, weight_versions=(0,) * len(cut))


PLAIN = Templates(
    Template(Role.GENERATOR, "<gen>{paragraph}", "built in tests"),
    Template(Role.PREDICTOR, "<pred>{masked_paragraph}", "built in tests"),
    "plain",
)
"""The demo policy's templates."""


def paragraph(text: str = "Paris is the capital of France.", id: str = "leads:1") -> Paragraph:
    return Paragraph(id, text)


def mask(answer: str = "Paris", text: str = "Paris is the capital of France.", paragraph_id: str = "leads:1") -> Mask:
    """A valid mask on every place of `answer` in `text`."""
    made = hide_answer(answer, Paragraph(paragraph_id, text), MaskRules(), random.Random(0)).mask
    assert made is not None, f"{answer!r} cannot be hidden in {text!r}"
    return made


def completion(
    response: str = "\\boxed{Paris}", prompt: str = "<pred>[mask] is the capital.", finish_reason: FinishReason = "stop"
) -> Completion:
    tokenizer = ByteTokenizer()
    ids = (*tokenizer.encode(response), *((tokenizer.EOS,) if finish_reason == "stop" else ()))
    return Completion(tuple(tokenizer.encode(prompt)), ids, (-0.5,) * len(ids), finish_reason, (0,) * len(ids))


def rollout(
    role: Role = Role.PREDICTOR,
    reward: float = 1.0,
    *,
    answer: str | None = "Paris",
    group_id: str = "1.0.0",
    mask_id: str = "1.0.0",
    valid: bool = True,
    reject_reason: str | None = None,
    hidden: Mask | None = None,
    finish_reason: FinishReason = "stop",
    paragraph_id: str = "leads:1",
) -> Rollout:
    """A rollout whose parts agree: a prediction of `hidden` (default: Paris), or a mask rollout that names it."""
    is_mask = role is Role.GENERATOR
    hidden = hidden if hidden is not None or not valid else mask(paragraph_id=paragraph_id)
    response = "no braces" if answer is None else f"\\{'mask' if is_mask else 'boxed'}{{ {answer}}}"
    prompt = "<gen>Paris is the capital of France." if is_mask else "<pred>[mask] is the capital of France."
    return Rollout(
        role=role,
        paragraph_id=paragraph_id,
        group_id=group_id,
        mask_id=mask_id,
        prompt=prompt,
        response=response,
        completion=completion(response, prompt, finish_reason),
        answer=answer,
        target=None if is_mask else (hidden or mask()).answer,
        valid=valid,
        reject_reason=reject_reason,
        reward=reward,
        mask=hidden or (None if is_mask else mask()),
    )


def group(rollouts: Sequence[Rollout]) -> Group:
    """The group that `rollouts` are, with advantages; kept where their rewards differ."""
    rewards = [r.reward for r in rollouts]
    return Group(rollouts[0].group_id, rollouts[0].role, tuple(rollouts), advantages(rewards), is_informative(rewards))


def sample(
    prompt: Sequence[int] = (5, 9),
    response: Sequence[int] = (7, 1),
    *,
    advantage: float = 1.0,
    role: Role | None = Role.PREDICTOR,
    weight: float = 1.0,
    log_prob: float = -0.5,
    group_id: str = "1.0.0",
) -> Sample:
    """A sample whose response is trained with `weight` and was sampled at `log_prob` a token."""
    zeros = (0.0,) * len(prompt)
    return Sample(
        token_ids=(*prompt, *response),
        loss_weights=(*zeros, *(weight for _ in response)),
        rollout_log_probs=(*zeros, *(log_prob for _ in response)),
        advantage=advantage,
        role=role,
        group_id=group_id,
    )
