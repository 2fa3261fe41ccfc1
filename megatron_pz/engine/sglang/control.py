"""What a server is told besides requests: pause, weights, memory. One method a call of SGLang's HTTP interface.

1. Tensors are taken only between `begin_weight_update` and `end_weight_update` (SGLang 0.5.21 and later).
2. A tensor of a wrong shape ends the server, and an unknown name is taken without a word: send what an export of the
   served model's family gives, and check afterwards.
3. A cache that is not flushed after new weights answers from the old ones.
4. A paused server answers here, and nothing that generates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.faults import ServerRefused
from megatron_pz.errors import EngineError

PauseMode = Literal["retract", "in_place", "abort"]
WEIGHTS_TIMEOUT_S = 1800.0


class Control:
    """Tells the server that `client` talks with.

    Every method raises ServerLost, ServerBusy or ServerRefused (faults.py), or EngineError where the server says that it
    failed.
    """

    def __init__(self, client: Client) -> None:
        self.client = client

    @property
    def url(self) -> str:
        """Of the server."""
        return self.client.url

    async def pause(self, mode: PauseMode) -> None:
        """Stop generating. `retract`: requests wait and compute their caches anew; `in_place`: they keep them;
        `abort`: they end as they are."""
        await self._post("/pause_generation", {"mode": mode})

    async def continue_generation(self) -> None:
        """Go on after `pause`."""
        await self._post("/continue_generation", {})

    async def flush_cache(self) -> None:
        """Forget cached prefixes; refused while requests run or are paused in place."""
        await self._post("/flush_cache", {})

    async def begin_weight_update(self) -> None:
        """From now on tensors are taken.

        A trainer that was killed while it handed weights over has left its update open, in a server that outlived it: that is
        ended first. What it had sent is overwritten, and nothing was generated in between: the server is paused.
        """
        try:
            await self._post("/begin_weight_update", {})
        except ServerRefused as refused:
            try:
                await self.end_weight_update()
            except ServerRefused:  # none was open
                raise refused from None
            await self._post("/begin_weight_update", {})

    async def end_weight_update(self) -> None:
        """All tensors have come."""
        await self._post("/end_weight_update", {})

    async def update_weights_from_disk(self, folder: str, version: str, *, flush_cache: bool) -> None:
        """Read the Hugging Face folder; where that fails the old weights stay."""
        body = {
            "model_path": folder,
            "weight_version": version,
            "load_format": "auto",  # else the one it was started with, and `dummy` would draw random weights
            "flush_cache": flush_cache,
            "abort_all_requests": False,
        }
        await self._post("/update_weights_from_disk", body)

    async def update_weights_from_tensor(self, payloads: Sequence[str], *, load_format: str | None = None) -> None:
        """Take the tensors in `payloads`: base64 of a pickle for each tensor-parallel rank of the server."""
        body = {"serialized_named_tensors": list(payloads), "load_format": load_format, "flush_cache": False}
        await self._post("/update_weights_from_tensor", body)

    async def init_weights_update_group(self, **group: Any) -> None:
        """Join a process group; answers when every member has come."""
        await self._post("/init_weights_update_group", group)

    async def update_weights_from_distributed(self, **what: Any) -> None:
        """Take the tensors that the group's rank 0 broadcasts now."""
        await self._post("/update_weights_from_distributed", {**what, "flush_cache": False})

    async def destroy_weights_update_group(self, group_name: str) -> None:
        """Leave the group."""
        await self._post("/destroy_weights_update_group", {"group_name": group_name})

    async def set_weight_version(self, version: str) -> None:
        """Stamp tokens with `version` from now on."""
        await self._post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    async def weight_version(self) -> str:
        """What tokens are stamped with."""
        return str((await self.model_info())["weight_version"])

    async def model_info(self) -> Mapping[str, Any]:
        """Facts of the model that is served."""
        found: Mapping[str, Any] = await self.client.get("/model_info")
        return found

    async def server_info(self) -> Mapping[str, Any]:
        """Every argument of the server."""
        found: Mapping[str, Any] = await self.client.get("/server_info")
        return found

    async def checksums(self) -> Any:
        """A digest of every tensor on every rank of the server."""
        return await self._post("/weights_checker", {"action": "checksum"})

    async def release_memory(self) -> None:
        """Give weights and cache up; nothing runs or is cached."""
        await self._post("/release_memory_occupation", {})

    async def resume_memory(self) -> None:
        """Take the memory back; the weights are void until they are handed over."""
        await self._post("/resume_memory_occupation", {})

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        reply = await self.client.post(path, body, timeout_s=WEIGHTS_TIMEOUT_S)
        if isinstance(reply, Mapping) and reply.get("success") is False:
            raise EngineError(f"{self.url}{path} failed: {reply.get('message') or reply}")
        return reply
