"""Fake SGLang servers in a process of their own: they answer at once, in SGLang's form, what the game can read.

They generate nothing. A reply is filler of a drawn length and then a mask of a word of the paragraph, or half of the time
the word that was hidden. It is made once a prompt, so that the fakes take less time than whoever asks them.

Usage: fake_servers.py CORPUS NUM_SERVERS MEAN_TOKENS SIGMA LATENCY_S
prints one line of ports as JSON and serves until its input ends. A reply takes up to twice LATENCY_S, by lot: requests are
under way together.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from megatron_pz.corpus.tokenizer import load_tokenizer

POLICY = "examples/demo_policy"
VARIANTS = 4
"""Different replies to a prompt."""


class Fakes:
    """What all fakes of this process know."""

    def __init__(self, corpus: Path, mean_tokens: float, sigma: float, latency_s: float) -> None:
        self.texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
        self.tokenizer = load_tokenizer(POLICY)
        self.mean_tokens, self.sigma, self.latency_s = mean_tokens, sigma, latency_s
        self.rng = random.Random(0)
        self._bodies: dict[tuple[int, ...], list[bytes]] = {}

    async def generate(self, request: web.Request) -> web.Response:
        """A reply to /generate."""
        body = await request.json()
        prompt = tuple(body["input_ids"])
        if prompt not in self._bodies:
            self._bodies[prompt] = self._replies(prompt, body["sampling_params"]["max_new_tokens"])
        body_bytes = self.rng.choice(self._bodies[prompt])  # by lot: in turns, equal groups get equal answers
        if self.latency_s:
            await asyncio.sleep(self.rng.uniform(0, 2 * self.latency_s))
        return web.Response(body=body_bytes, content_type="application/json")

    def _replies(self, prompt: tuple[int, ...], longest: int) -> list[bytes]:
        text = self.tokenizer.decode(prompt)
        if text.startswith("<gen>"):
            words = sorted({word for word in text[5:].split() if word.isalpha() and len(word) > 3})
            answers = [f"\\mask{{ {word}}}" for word in self.rng.choices(words or ["none"], k=VARIANTS)]
        else:
            hidden = self._hidden(text.removeprefix("<pred>"))
            answers = [f"\\boxed{{ {word}}}" for word in (hidden, "nothing") * (VARIANTS // 2)]
        return [self._body(prompt, answer, longest) for answer in answers]

    def _hidden(self, masked: str) -> str:
        before, _, after = masked.partition("[mask]")
        for text in self.texts:
            if text.startswith(before) and text.endswith(after):
                return str(text[len(before) : len(text) - len(after)])
        return "nothing"

    def _body(self, prompt: tuple[int, ...], answer: str, longest: int) -> bytes:
        ids = [*self.tokenizer.encode(answer), self.tokenizer.eos_token_ids[0]]
        drawn = self.rng.lognormvariate(math.log(self.mean_tokens) - self.sigma**2 / 2, self.sigma)
        fill = max(0, min(longest, round(drawn)) - len(ids))
        ids = self.rng.choices(prompt[1:], k=fill) + ids
        rows = [[-self.rng.expovariate(2.0), token, None] for token in ids]
        reply: dict[str, Any] = {
            "text": "",
            "output_ids": ids,
            "meta_info": {
                "id": "0" * 32,
                "finish_reason": {"type": "stop", "matched": ids[-1]},
                "prompt_tokens": len(prompt),
                "weight_version": "0",
                "completion_tokens": len(ids),
                "cached_tokens": 0,
                "output_token_logprobs": rows,
            },
        }
        return json.dumps(reply).encode()


async def serve(fakes: Fakes, num_servers: int) -> None:
    """Listen until standard input ends."""
    app = web.Application()
    app.router.add_post("/generate", fakes.generate)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    ports = []
    for _ in range(num_servers):
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        ports.append(site._server.sockets[0].getsockname()[1])  # type: ignore[union-attr]
    sys.stdout.write(json.dumps(ports) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    corpus_file, count, *drawn = sys.argv[1:]
    asyncio.run(serve(Fakes(Path(corpus_file), *map(float, drawn)), int(count)))
