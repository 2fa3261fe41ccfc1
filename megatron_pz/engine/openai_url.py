"""Text in, text out with any server that speaks OpenAI's HTTP: `/v1/chat/completions` or `/v1/completions`.

Blocking, so that it is a thread's business and belongs to no event loop; one object may be used by many threads.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_pz.engine.sglang.faults import ServerBusy, ServerLost, ServerRefused
from megatron_pz.errors import EngineError

Api = Literal["chat", "completions"]
LONGEST_PAUSE_S = 30.0
_NOT_NOW = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Told:
    """What a server answered."""

    text: str
    is_cut: bool  # it ended at the token limit
    num_tokens: int  # of the answer; 0 where the server does not say


class OpenAIServers:
    """Asks `urls` in turn.

    Args:
        urls: with or without `/v1` at the end.
        api: whether a prompt is one user turn, or the whole text.
        model: as the servers call it; empty: the first that they name.
        tries: of each question, with pauses that double from `first_pause_s`.
        timeout_s: for one answer.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api: Api = "chat",
        model: str = "",
        api_key: str = "",
        tries: int = 4,
        timeout_s: float = 600.0,
        first_pause_s: float = 1.0,
    ) -> None:
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.api, self.model, self.tries = api, model, tries
        self.timeout_s, self.first_pause_s = timeout_s, first_pause_s
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._turn = itertools.count()

    def complete(self, prompt: str, max_new_tokens: int, **params: Any) -> Told:
        """The answer to `prompt`.

        Args:
            params: of the request, e.g. `temperature`, `top_p`, `seed`.

        Raises:
            ServerLost, ServerBusy: no server answered, however often it was asked.
            ServerRefused: a server said no; asking again would not help.
            EngineError: a server answered what cannot be read.
        """
        chat = self.api == "chat"
        question = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        path = "/v1/chat/completions" if chat else "/v1/completions"

        def ask(url: str) -> Told:
            body = {"model": self._model(url), "max_tokens": max_new_tokens, **question, **params}
            return _told(url + path, self._call(url, path, body), chat)

        return self._tried(ask)

    def model_name(self) -> str:
        """`model`, or the first that a server names; raises as `complete`."""
        return self._tried(self._model)

    def _tried(self, ask: Any) -> Any:
        for number in range(self.tries):
            try:
                return ask(self.urls[next(self._turn) % len(self.urls)])
            except (ServerLost, ServerBusy):
                if number == self.tries - 1:
                    raise
                time.sleep(min(self.first_pause_s * 2**number, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0))
        raise AssertionError(f"{self.tries} tries")

    def _model(self, url: str) -> str:
        if not self.model:
            found = self._call(url, "/v1/models", None)
            try:
                self.model = str(found["data"][0]["id"])
            except (KeyError, IndexError, TypeError) as error:
                raise EngineError(f"{url}/v1/models names no model: {str(found)[:300]}. Name it yourself.") from error
        return self.model

    def _call(self, url: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data=data, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                found = reply.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code in _NOT_NOW:
                raise ServerBusy(f"{url}{path} answered HTTP {error.code}: {text[:500]}") from error
            raise ServerRefused(url, path, error.code, text) from error
        except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
            raise ServerLost(f"The server at {url} did not answer {path}: {error or type(error).__name__}.") from error
        try:
            return json.loads(found)
        except ValueError as error:
            raise EngineError(f"{url}{path} answered what is not JSON: {found[:300]!r}.") from error


def _told(where: str, reply: Any, chat: bool) -> Told:
    try:
        choice = reply["choices"][0]
        # A server that keeps the reasoning apart sends it beside the content.
        text = (choice["message"].get("content") or "") if chat else choice["text"]
        count = (reply.get("usage") or {}).get("completion_tokens") or 0
        return Told(str(text), choice.get("finish_reason") == "length", int(count))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise EngineError(
            f"{where} answered what is no completion ({type(error).__name__}: {error}): {str(reply)[:300]}."
        ) from error
