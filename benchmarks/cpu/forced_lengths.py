"""Responses of forced lengths whose text is scripted, a server that counts decode steps, and a barrier between levels."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_pz.game.seeds import derive
from megatron_pz.tasks.pretrain_zero import PretrainZero
from megatron_pz.types import Completion, Generate, SamplingParams

LONGEST = 400  # tokens of a response; the demo policy has 512 positions
MEAN = 32.0


@dataclass(frozen=True)
class Law:
    """Lengths of responses: log-normal, cut at `LONGEST`, with the same mean for every `sigma` before the cut."""

    name: str
    sigma: float

    def length(self, seed: int) -> int:
        """Of the response to the request of this seed."""
        rng = random.Random(derive(seed, "length"))
        return max(1, min(LONGEST, round(rng.lognormvariate(math.log(MEAN) - self.sigma**2 / 2, self.sigma))))


def scripted(game: PretrainZero, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
    """What the game reads: a word of the paragraph, named by the seed."""
    tokenizer = game.asker.tokenizer
    text = tokenizer.decode(prompt_ids)
    words = [word for word in text.removeprefix("<gen>").split() if word.isalpha() and len(word) > 3] or ["none"]
    command = "mask" if text.startswith("<gen>") else "boxed"
    reply = f"\\{command}{{ {random.Random(params.seed).choice(words)}}}"
    ids = (*tokenizer.encode(reply), tokenizer.eos_token_ids[0])
    return Completion(tuple(prompt_ids), ids, (-1.0,) * len(ids), "stop", (0,) * len(ids))


class Clock:
    """A server whose decode steps all take the same time, however many requests are in them; it counts them."""

    def __init__(self, game: PretrainZero, law: Law, slots: int) -> None:
        self.game, self.law, self.slots = game, law, slots
        self.steps = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def __call__(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((self.law.length(params.seed), done))
        await done
        return scripted(self.game, prompt_ids, params)

    async def run(self) -> None:
        """Step until cancelled."""
        running: list[tuple[int, asyncio.Future[None]]] = []
        while True:
            for _ in range(20):  # whoever has an answer may ask on
                await asyncio.sleep(0)
            self._waiting = [one for one in self._waiting if not one[1].done()]
            running = [one for one in running if not one[1].done()]
            free = self.slots - len(running)
            running, self._waiting = running + self._waiting[:free], self._waiting[free:]
            if running:
                ahead = min(left for left, _ in running)
                self.steps += ahead
                running = [(left - ahead, done) for left, done in running]
                for left, done in running:
                    if not left:
                        done.set_result(None)


class Barrier:
    """Mask responses are handed on when all of them have landed."""

    def __init__(self, generate: Generate, num_masks: int, is_mask: Callable[[Sequence[int]], bool]) -> None:
        self.generate, self.missing, self.is_mask = generate, num_masks, is_mask
        self.landed = asyncio.Event()

    async def __call__(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        completion = await self.generate(prompt_ids, params)
        if self.is_mask(prompt_ids):
            self.missing -= 1
            if not self.missing:
                self.landed.set()
            await self.landed.wait()
        return completion
