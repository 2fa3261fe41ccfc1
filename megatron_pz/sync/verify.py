"""Have all servers the trainer's weights? (`sglang.verify_weights`)

While they are still paused:

1. Every tensor of a server on a CPU has the digest of the trainer's (digests.py). This is how a tensor of a name that the
   server does not know would show: it takes that without a word.
2. Every tensor has the same digest on all servers, whatever they run on.

And when they go on: a greedy response to one prompt has the same tokens on all servers. That the log-probs are the trainer's is
measured in every step, as `mismatch_kl` and `mismatch/max_abs`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_pz.engine.sglang.control import Control
from megatron_pz.errors import EngineError
from megatron_pz.sync.digests import server_digests
from megatron_pz.sync.push import Receivers
from megatron_pz.types import SamplingParams

PROBE_TOKENS = 8
_DTYPES = {"float32": torch.float32, "float": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Verifier:
    """`sync.push.Checks`; a server that differs is reported as not having taken its weights.

    Args:
        probe: token ids of the prompt.
        export: whole tensors by Hugging Face name; yields on rank 0 alone, though all ranks iterate.
        tell: takes a line to show.
    """

    def __init__(
        self,
        probe: Sequence[int],
        export: Callable[[Any], Iterator[tuple[str, Tensor]]],
        tell: Callable[[str], None],
    ) -> None:
        self._probe, self._export, self._tell = tuple(probe), export, tell
        self._has_told = False

    def weights(self, weights: Any, receivers: Receivers) -> None:
        """Drop the servers whose tensors are not `weights`, or are not those of the first server. All ranks."""
        infos = receivers.each(lambda control: control.server_info())
        dtype = _compared_as(list(infos.values()))
        own = server_digests(self._export(weights), dtype or torch.float32)  # nothing on ranks other than 0
        sums = {server: flat(reply) for server, reply in receivers.each(lambda control: control.checksums()).items()}
        if dtype is not None:
            expected, whose = {f"0/{name}": digest for name, digest in own.items()}, "the trainer"
        elif sums:
            first, expected = next(iter(sums.items()))
            whose = receivers.controls[first].url
            self._say_once("Weights are compared over the servers only: these are not whole on a CPU.")
        for server, found in sums.items():
            different = sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name))
            if different:
                url = receivers.controls[server].url
                fault = f"{url} and {whose} differ in {len(different)} of {len(found)} tensors, first {different[0]}."
                receivers.drop(server, EngineError(fault))

    def probe(self, receivers: Receivers) -> None:
        """Drop the servers that answer otherwise than the first."""
        found = receivers.each(self._answer)
        expected = next(iter(found.values()), None)
        for server, tokens in found.items():
            if tokens != expected:
                url = receivers.controls[server].url
                receivers.drop(server, EngineError(f"{url} answers {tokens} to the probe; another server {expected}."))

    def _say_once(self, line: str) -> None:
        if not self._has_told:
            self._has_told = True
            self._tell(line)

    async def _answer(self, control: Control) -> tuple[int, ...]:
        params = SamplingParams(max_new_tokens=PROBE_TOKENS, temperature=0.0)
        return (await control.client.generate(f"probe-{uuid.uuid4().hex}", self._probe, params)).token_ids


def flat(reply: Mapping[str, Any]) -> dict[str, str]:
    """Checksums by "rank/tensor" of the server's reply, for a server of any size."""
    return {
        f"{rank}/{name}": checksum
        for rank, info in enumerate(reply["ranks"])
        for name, checksum in info["checksums"].items()
    }


def _compared_as(infos: Sequence[Mapping[str, Any]]) -> torch.dtype | None:
    """Dtype in which all servers hold whole tensors on a CPU; None where they do not."""
    kinds = {(info.get("device"), info.get("tp_size"), info.get("dtype")) for info in infos}
    if len(kinds) != 1:
        return None
    device, tp_size, dtype = kinds.pop()
    return _DTYPES.get(str(dtype)) if device == "cpu" and tp_size == 1 else None
