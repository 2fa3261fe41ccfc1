"""What one server is sent, what is read of its reply, and what becomes of a fault (engine/sglang/client.py).

The server is tests/fault_injecting_fake.py; the real one: tests/sglang/test_client_real.py.
"""

import asyncio
import base64
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from fault_injecting_fake import (
    EXPERTS_SHAPE,
    VOCAB_SIZE,
    FakeServer,
    answer,
    changed,
    cut_before,
    cut_within,
    expected,
    hang,
    refuse,
)

from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.faults import ServerBusy, ServerLost, ServerRefused
from megatron_pz.errors import EngineError
from megatron_pz.types import SamplingParams

PARAMS = SamplingParams(max_new_tokens=3)
CONTEXT_LENGTH = 16


@pytest.fixture
async def fake():
    async with FakeServer() as server:
        yield server


@pytest.fixture
async def client(fake):
    made = Client(fake.url, "the key", vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, health_timeout_s=0.2)
    yield made
    await made.close()


async def with_experts(fake, prompt_ids, params):
    client = Client(fake.url, "", vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, experts_shape=EXPERTS_SHAPE)
    try:
        return await client.generate("r", prompt_ids, params)
    finally:
        await client.close()


# ---- what is sent


@pytest.mark.parametrize(
    ("prompt_ids", "count", "told"),
    [
        ((), 3, "no tokens"),
        ((1, VOCAB_SIZE), 3, r"Token 1 of the prompt is 100; ids of this model are 0 to 99"),
        ((1, 2, -1), 3, r"Token 2 of the prompt is -1"),
        ((1, 2.0), 3, r"Token 1 of the prompt is 2.0; ids are integers"),
        ((1, None), 3, r"Token 1 of the prompt is None"),
        ((1,), 0, r"max_new_tokens is 0"),
        (
            range(14),
            3,
            r"14 tokens and a response of up to 3 do not fit the servers' context of 16.*--max-prompt-tokens",
        ),
    ],
)
async def test_a_request_out_of_range_is_not_sent(fake, client, prompt_ids, count, told):
    with pytest.raises(EngineError, match=told):
        await client.generate("r", prompt_ids, SamplingParams(count))
    assert fake.received == []


async def test_what_just_fits_is_sent(fake, client):
    assert len((await client.generate("r", [VOCAB_SIZE - 1, 0] + [5] * 11, PARAMS)).token_ids) == 3


async def test_ids_of_numpy_are_sent_as_numbers(fake, client):
    found = await client.generate("r", np.array([1, 2], dtype=np.int64), PARAMS)
    assert fake.received[0]["input_ids"] == [1, 2]
    assert found.prompt_ids == (1, 2) and all(type(token) is int for token in found.prompt_ids)


async def test_every_setting_of_the_sampling_reaches_the_server_under_the_key(fake, client):
    params = SamplingParams(2, temperature=0.5, top_p=0.9, top_k=7, stop_token_ids=(4, 5), seed=2**63 - 1)
    await client.generate("name", [1], params)
    await client.generate("other", [1], SamplingParams(2))
    first, second = fake.received
    assert first == {
        "rid": "name",
        "input_ids": [1],
        "sampling_params": {
            "max_new_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "stop_token_ids": [4, 5],
            "sampling_seed": 2**63 - 1,
        },
        "return_logprob": True,
    }
    assert second["sampling_params"]["top_k"] == -1  # off
    assert fake.headers[0]["Authorization"] == "Bearer the key"


# ---- what is read


async def test_a_reply_is_read_field_by_field(fake, client):
    fake.version = 7
    found = await client.generate("r", [40, 50], PARAMS)
    assert found.prompt_ids == (40, 50)
    assert found.token_ids == (91, 92, 93)
    assert found.logprobs == (-0.125, -0.25, -0.375)
    assert found.finish_reason == "length"
    assert found.weight_versions == (7, 7, 7)
    assert found.routed_experts is None


async def test_a_stop_is_told_from_a_length(fake, client):
    fake.next.append(changed(lambda reply: reply["meta_info"].update(finish_reason={"type": "stop", "matched": 2})))
    assert (await client.generate("r", [1], PARAMS)).finish_reason == "stop"


async def test_versions_are_those_of_each_token(fake, client):
    spans = [{"version": "default", "start": 0, "end": 1}, {"version": "12", "start": 1, "end": 3}]
    fake.next.append(changed(lambda reply: reply["meta_info"].update(weight_versions=spans)))
    assert (await client.generate("r", [1], PARAMS)).weight_versions == (-1, 12, 12)


async def test_experts_are_an_array_of_every_token_but_the_last(fake):
    found = await with_experts(fake, [1, 2, 3], PARAMS)
    assert fake.received[0]["return_routed_experts"] is True
    assert found.routed_experts.shape == (3 + 3 - 1, *EXPERTS_SHAPE) and found.routed_experts.dtype == np.int32
    assert found.routed_experts.ravel().tolist() == list(range(5 * 2 * 3))


def cut_short(reply):
    """Give the request up after one token."""
    meta = reply["meta_info"]
    reply["output_ids"] = reply["output_ids"][:1]
    meta.update(output_token_logprobs=meta["output_token_logprobs"][:1], finish_reason={"type": "abort"})


async def test_a_response_given_up_keeps_its_tokens(fake, client):
    fake.next.append(changed(cut_short))
    found = await client.generate("r", [1], PARAMS)
    assert (found.finish_reason, found.token_ids, found.logprobs) == ("abort", (2,), (-0.125,))


async def test_one_given_up_before_its_first_token_is_empty(fake, client):
    def nothing(reply):
        reply["output_ids"] = []
        reply["meta_info"].update(output_token_logprobs=[], finish_reason={"type": "abort"})

    fake.next.append(changed(nothing))
    found = await client.generate("r", [1], PARAMS)
    assert (found.finish_reason, found.token_ids, found.logprobs, found.weight_versions) == ("abort", (), (), ())


def in_meta(**fields):
    return changed(lambda reply: reply["meta_info"].update(fields))


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        (changed(lambda reply: reply.update(output_ids=[2, 3, 5])), "log-probs of 3 others"),
        (changed(lambda reply: reply.update(output_ids=[2, 3])), "2 tokens have log-probs of 3 others"),
        (changed(lambda reply: reply.pop("output_ids")), "KeyError.*output_ids"),
        (changed(lambda reply: reply.pop("meta_info")), "KeyError.*meta_info"),
        (in_meta(output_token_logprobs=None), "log-probs of 0 others"),
        (in_meta(output_token_logprobs=[[-1, 2], [math.nan, 3], [-1, 4]]), "log-prob is not finite"),
        (in_meta(output_token_logprobs=[[-1, 2], [-math.inf, 3], [-1, 4]]), "log-prob is not finite"),
        (in_meta(output_token_logprobs=[[-1, 2], [None, 3], [-1, 4]]), "TypeError"),
        (in_meta(finish_reason={"type": "tired"}), "tired"),
        (in_meta(finish_reason=None), "TypeError"),
        (in_meta(weight_versions=[{"version": "1", "start": 0, "end": 2}]), "3 tokens have versions of 2"),
        (refuse(200, "good day"), "good day"),
        (refuse(200, "[]"), "TypeError"),
    ],
)
async def test_a_reply_that_is_not_what_was_asked_for_is_an_error_with_its_words(fake, client, behaviour, told):
    fake.next.append(behaviour)
    with pytest.raises(
        EngineError, match=rf"(?s){re.escape(fake.url)}/generate answered what this client cannot.*{told}"
    ):
        await client.generate("r", [1], PARAMS)


async def test_ids_outside_the_vocabulary_and_too_many_of_them_are_errors(fake, client):
    def strange(reply):
        reply["output_ids"][1] = VOCAB_SIZE
        reply["meta_info"]["output_token_logprobs"][1][1] = VOCAB_SIZE

    def longer(reply):
        reply["output_ids"].append(9)
        reply["meta_info"]["output_token_logprobs"].append([-1.0, 9, None])

    fake.next += [changed(strange), changed(longer)]
    with pytest.raises(EngineError, match="outside 0 to 99"):
        await client.generate("r", [1], PARAMS)
    with pytest.raises(EngineError, match="4 tokens came, 3 were asked for"):
        await client.generate("r", [1], PARAMS)


@pytest.mark.parametrize(
    ("experts", "told"),
    [(None, "--enable-return-routed-experts"), (base64.b64encode(bytes(4 * 6)).decode(), "reshape")],
)
async def test_experts_that_are_missing_or_too_few_are_an_error(fake, experts, told):
    fake.next.append(in_meta(routed_experts=experts))
    with pytest.raises(EngineError, match=told):
        await with_experts(fake, [1], PARAMS)


# ---- faults


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, ServerRefused), (401, ServerRefused), (500, ServerRefused), (503, ServerBusy), (429, ServerBusy)],
)
async def test_an_error_of_http_carries_the_servers_words(fake, client, status, kind):
    fake.next.append(refuse(status, "the prompt is dull"))
    with pytest.raises(kind, match=f"{fake.url}/generate answered HTTP {status}: the prompt is dull"):
        await client.generate("r", [1], PARAMS)
    assert len(fake.received) == 1


@pytest.mark.parametrize("behaviour", [cut_before, cut_within])
async def test_a_connection_that_breaks_is_a_lost_server_and_the_next_request_gets_another(fake, client, behaviour):
    fake.next.append(behaviour)
    with pytest.raises(ServerLost, match=f"{fake.url} did not answer /generate"):
        await client.generate("r", [1], PARAMS)
    assert len(fake.received) == 1  # the transport does not ask again by itself: the pool decides
    assert await client.generate("r", [1], PARAMS) == expected([1], PARAMS)


async def test_nobody_listening_is_a_lost_server(fake, client):
    await fake.kill()
    with pytest.raises(ServerLost, match="did not answer"):
        await client.generate("r", [1], PARAMS)
    assert not await client.is_up()


async def test_a_control_call_without_an_answer_in_time_is_a_lost_server(fake, client):
    fake.health = None
    with pytest.raises(ServerLost, match=r"did not answer /health_generate: no answer within 0.05 s"):
        await client.get("/health_generate", timeout_s=0.05)


async def test_health_tells_a_server_that_hangs_from_one_that_is_gone(fake, client):
    assert await client.is_up() and await client.can_generate()
    fake.health = None
    started = time.monotonic()
    assert await client.is_up() and not await client.can_generate()
    assert time.monotonic() - started < 2  # health_timeout_s is 0.2
    fake.health = 503
    assert not await client.can_generate()
    await fake.kill()
    assert not await client.is_up() and not await client.can_generate()


async def test_a_server_that_answers_in_time_is_up_however_late_the_loop_is():
    """A process of its own: the fake would be as late as its client."""
    code = (
        "import http.server as h\n"
        "class Well(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "server = h.HTTPServer(('127.0.0.1', 0), Well)\n"
        "print(server.server_port, flush=True); server.serve_forever()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        client = Client(url, "", vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, health_timeout_s=1.0)

        async def late():
            while True:
                time.sleep(1.5)  # longer than the server may take
                await asyncio.sleep(0)

        task = asyncio.create_task(late())
        try:
            assert await client.is_up() and await client.can_generate()
        finally:
            task.cancel()
            server.kill()


async def test_an_abort_ends_the_request_at_the_server(fake, client):
    fake.always = hang
    asked = asyncio.ensure_future(client.generate("mine", [1], PARAMS))
    while not fake.under_way:
        await asyncio.sleep(0.001)
    await client.abort("mine")
    assert (await asked).finish_reason == "abort"
    assert fake.aborted == ["mine"]


async def test_after_an_idle_time_the_connection_is_not_used_again(fake, client, monkeypatch):
    monkeypatch.setattr("megatron_pz.engine.sglang.client.KEEPALIVE_S", 0.01)
    ports = set()

    async def noted(fake, request, reply):
        ports.add(request.transport.get_extra_info("peername"))
        return await answer(fake, request, reply)

    fake.always = noted
    for _ in range(2):
        await client.generate("r", [1], PARAMS)
        await asyncio.sleep(0.05)
    assert len(ports) == 2
