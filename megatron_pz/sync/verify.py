"""Do all servers have the same weights, and did they change? (`sglang.verify_weights`)

1. A checksum of every tensor is equal on all servers.
2. A greedy response to one prompt has the same tokens on all servers.
3. Tensors that kept their checksum while others changed are told: a server takes a tensor of an unknown name without a
   word, and this is how it would show. (Tensors that are not trained show in the same way.)

Whether they are the trainer's weights is measured every step, as `mismatch_kl` and `mismatch/max_abs`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_pz.engine.sglang.control import Control
from megatron_pz.errors import EngineError
from megatron_pz.sync.push import Receivers
from megatron_pz.types import SamplingParams

PROBE_TOKENS = 8


class Verifier:
    """Checks servers after each push; one that differs from the first is reported as not having taken its weights.

    Args:
        probe: token ids of the prompt.
        tell: takes a line to show.
    """

    def __init__(self, probe: Sequence[int], tell: Callable[[str], None]) -> None:
        self._probe, self._tell = tuple(probe), tell
        self._before: Mapping[str, str] = {}

    def __call__(self, receivers: Receivers) -> None:
        """Drop the servers that differ."""
        sums = {server: flat(reply) for server, reply in receivers.each(lambda control: control.checksums()).items()}
        if not sums:
            return
        first, expected = next(iter(sums.items()))
        for server, found in sums.items():
            if different := [name for name in expected if found.get(name) != expected[name]]:
                url, other = receivers.controls[server].url, receivers.controls[first].url
                fault = f"{url} and {other} differ in {len(different)} of {len(found)} tensors, first {different[0]}"
                receivers.drop(server, EngineError(fault + "."))
        same = [name for name, checksum in expected.items() if self._before.get(name) == checksum]
        if self._before and 0 < len(same) < len(expected):
            self._tell(f"{len(same)} of {len(expected)} tensors of the servers did not change, first {same[0]}")
        self._before = expected
        self._probe_all(receivers)

    def _probe_all(self, receivers: Receivers) -> None:
        found = receivers.each(self._answer)
        expected = next(iter(found.values()), None)
        for server, tokens in found.items():
            if tokens != expected:
                url = receivers.controls[server].url
                receivers.drop(server, EngineError(f"{url} answers {tokens} to the probe; another server {expected}."))

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
