"""Talk with one server over HTTP: token ids out, token ids with log-probs back. Lives in one event loop.

What would hurt a server is refused before it is sent: an id outside the vocabulary ends the whole SGLang process, and a
request that is too long for the context is an error there too.
"""

from __future__ import annotations

import base64
import json
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np

from megatron_pz.engine.sglang.faults import ServerBusy, ServerLost, ServerRefused
from megatron_pz.engine.sglang.probe import answers
from megatron_pz.errors import EngineError
from megatron_pz.types import Completion, FinishReason, SamplingParams

CONNECT_TIMEOUT_S = 10.0
CONTROL_TIMEOUT_S = 120.0
KEEPALIVE_S = 2.0
"""SGLang closes a connection that was idle for 5 s, and a request that is sent just then is lost."""
HEALTH_TIMEOUT_S = 20.0
ABORT_TIMEOUT_S = 10.0

_NOT_NOW = (429, 503)
_FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class Client:
    """Talks with the server at `url`.

    Args:
        api_key: "" where the server has none.
        vocab_size: ids are below it.
        context_length: most tokens of prompt and response together.
        experts_shape: (layers, experts a token) where the experts that each token was routed to are asked for.
        health_timeout_s: within which a server that is well generates a token.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        vocab_size: int,
        context_length: int,
        experts_shape: tuple[int, int] | None = None,
        health_timeout_s: float = HEALTH_TIMEOUT_S,
    ) -> None:
        self.url, self.vocab_size, self.context_length = url.rstrip("/"), vocab_size, context_length
        self.experts_shape, self.health_timeout_s = experts_shape, health_timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def generate(self, rid: str, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """One sampled response.

        Args:
            rid: name under which `abort` knows the request.

        Raises:
            EngineError: the request is out of range and was not sent, or the reply is not what was asked for.
            ServerLost, ServerBusy, ServerRefused: see there.
        """
        ids = self.check(prompt_ids, params)
        body: dict[str, Any] = {
            "rid": rid,
            "input_ids": ids,
            "sampling_params": sampling_params(params),
            "return_logprob": True,
        }
        if self.experts_shape:
            body["return_routed_experts"] = True
        reply = await self.post("/generate", body, timeout_s=None)
        try:
            return self._completion(ids, params, reply)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineError(
                f"{self.url}/generate answered what this client cannot read ({type(error).__name__}: {error}): "
                f"{str(reply)[:500]}. Supported versions of SGLang are in engine/sglang/versions.py."
            ) from error

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """`prompt_ids` as Python's integers, if the server can answer.

        Raises:
            EngineError: with the number that is out of range.
        """
        if not len(prompt_ids):
            raise EngineError("The prompt has no tokens; an SGLang server needs at least one.")
        try:
            ids = tuple(map(operator.index, prompt_ids))
        except TypeError as error:
            place, token = next((at, t) for at, t in enumerate(prompt_ids) if not hasattr(t, "__index__"))
            raise EngineError(f"Token {place} of the prompt is {token!r}; ids are integers.") from error
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            place, token = next((at, t) for at, t in enumerate(ids) if not 0 <= t < self.vocab_size)
            raise EngineError(
                f"Token {place} of the prompt is {token}; ids of this model are 0 to {self.vocab_size - 1}, and another "
                "would end the server. Does the tokenizer belong to the model?"
            )
        if params.max_new_tokens < 1:
            raise EngineError(f"max_new_tokens is {params.max_new_tokens}; it must be at least 1.")
        if len(ids) + params.max_new_tokens > self.context_length:
            raise EngineError(
                f"A prompt of {len(ids)} tokens and a response of up to {params.max_new_tokens} do not fit the servers' "
                f"context of {self.context_length}. Lower --max-prompt-tokens or --max-response-tokens."
            )
        return ids

    async def abort(self, rid: str) -> None:
        """Have the server give up the request; one that it does not know is none."""
        await self.post("/abort_request", {"rid": rid}, timeout_s=ABORT_TIMEOUT_S)

    async def is_up(self) -> bool:
        """Whether the server's front answers; so does a paused one, and one whose scheduler hangs."""
        return await answers(
            f"{self.url}/model_info", self._headers, timeout_s=min(CONNECT_TIMEOUT_S, self.health_timeout_s)
        )

    async def can_generate(self) -> bool:
        """Whether it generates a token in time. A paused server does not."""
        return await answers(f"{self.url}/health_generate", self._headers, self.health_timeout_s)

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float | None = CONTROL_TIMEOUT_S) -> Any:
        """Reply to a POST, as JSON or as text.

        Raises:
            ServerLost, ServerBusy, ServerRefused: see there.
        """
        return await self._ask("POST", path, body, timeout_s)

    async def get(self, path: str, timeout_s: float | None = CONTROL_TIMEOUT_S) -> Any:
        """Reply to a GET; otherwise as `post`."""
        return await self._ask("GET", path, None, timeout_s)

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None) -> Any:
        if self._session is None:
            # The pool bounds what is under way.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as reply:
                found, status = await reply.read(), reply.status
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            told = str(error) or type(error).__name__
            if isinstance(error, TimeoutError) and timeout_s is not None:
                told = f"no answer within {timeout_s:g} s"
            raise ServerLost(f"The SGLang server at {self.url} did not answer {path}: {told}.") from error
        if status == 200:
            try:
                return json.loads(found)
            except ValueError:
                pass  # some replies to control calls are sentences
        text = found.decode(errors="replace")
        if status in _NOT_NOW:
            raise ServerBusy(f"{self.url}{path} answered HTTP {status}: {text[:500]}")
        if status != 200:
            raise ServerRefused(self.url, path, status, text)
        return text

    def _completion(self, prompt_ids: tuple[int, ...], params: SamplingParams, reply: Any) -> Completion:
        meta = reply["meta_info"]
        reason = _FINISH_REASONS[meta["finish_reason"]["type"]]
        token_ids = tuple(reply["output_ids"])
        rows = meta.get("output_token_logprobs") or ()
        # Whole columns at a time: responses have thousands of tokens.
        logprobs, scored_ids, *_ = zip(*rows, strict=True) if rows else ((), ())
        if scored_ids != token_ids:
            raise ValueError(f"{len(token_ids)} tokens have log-probs of {len(scored_ids)} others")
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.vocab_size):
            raise ValueError(f"a sampled id is outside 0 to {self.vocab_size - 1}")
        if len(token_ids) > params.max_new_tokens:
            raise ValueError(f"{len(token_ids)} tokens came, {params.max_new_tokens} were asked for at most")
        logprobs = tuple(map(float, logprobs))
        if not math.isfinite(sum(logprobs)):
            raise ValueError("a log-prob is not finite")
        experts = None
        if self.experts_shape and reason != "abort":
            experts = _experts(meta.get("routed_experts"), self.experts_shape, len(prompt_ids) + len(token_ids) - 1)
        return Completion(prompt_ids, token_ids, logprobs, reason, _versions(meta, len(token_ids)), experts)


def sampling_params(params: SamplingParams) -> dict[str, Any]:
    """As SGLang spells them. Its temperature 0 is greedy with log-probs of temperature 1, as ours. It follows the seed under
    `--enable-deterministic-inference` only, and passes over it otherwise.

    >>> sampling_params(SamplingParams(max_new_tokens=8, temperature=0.5, stop_token_ids=(2,), seed=5))
    {'max_new_tokens': 8, 'temperature': 0.5, 'top_p': 1.0, 'top_k': -1, 'stop_token_ids': [2], 'sampling_seed': 5}
    """
    return {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "stop_token_ids": list(params.stop_token_ids),
        "sampling_seed": params.seed,
    }


def _versions(meta: Mapping[str, Any], num_tokens: int) -> tuple[int, ...]:
    """The policy version of each token; -1 for weights that the trainer has not handed over."""
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": num_tokens}]
    versions: list[int] = []
    for span in spans:
        version = str(span["version"])
        number = int(version) if version.removeprefix("-").isdigit() else -1
        versions += [number] * (min(int(span["end"]), num_tokens) - len(versions))
    if len(versions) != num_tokens:
        raise ValueError(f"{num_tokens} tokens have versions of {len(versions)}")
    return tuple(versions)


def _experts(coded: str | None, shape: tuple[int, int], num_tokens: int) -> np.ndarray:
    """int32 [num_tokens, layers, experts a token], of every token but the last."""
    if coded is None:
        raise ValueError(
            "routed experts were asked for and are not there; start servers with --enable-return-routed-experts"
        )
    return np.frombuffer(base64.b64decode(coded), dtype=np.int32).reshape(num_tokens, *shape)
