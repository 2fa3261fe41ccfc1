"""What is sent to a server, what is refused before it is sent, and which replies are not believed (engine/sglang/client.py).

The server is the fake; the real one answers in tests/sglang/test_client.py.
"""

import base64
import json
import math

import numpy as np
import pytest
from fault_injecting_fake import CONTEXT_LENGTH, VOCAB_SIZE, FaultInjectingFake, is_answer

from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.faults import ServerBusy, ServerLost, ServerRefused
from megatron_pz.errors import EngineError
from megatron_pz.types import SamplingParams

PARAMS = SamplingParams(max_new_tokens=3)


async def ask(word=None, ids=(5, 6), params=PARAMS, **about):
    """The completion that comes of a reply that `word` of the fake's script makes, and the fake."""
    async with FaultInjectingFake([word]) as fake:
        client = Client(fake.url, "key", vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, **about)
        try:
            return await client.generate("rid", ids, params), fake
        finally:
            await client.close()


def meta(**changes):
    """A word of the fake's script: the reply with other fields in `meta_info`."""
    return lambda reply: reply | {"meta_info": reply["meta_info"] | changes}


async def test_ids_go_out_and_ids_with_log_probs_come_back():
    params = SamplingParams(3, temperature=0.7, top_p=0.9, top_k=5, stop_token_ids=(1, 2))
    completion, fake = await ask(ids=(5, 6), params=params)
    assert fake.requests == [
        {
            "rid": "rid",
            "input_ids": [5, 6],
            "sampling_params": {
                "max_new_tokens": 3,
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": 5,
                "stop_token_ids": [1, 2],
            },
            "return_logprob": True,
        }
    ]
    assert fake.headers[0]["Authorization"] == "Bearer key"
    assert completion.prompt_ids == (5, 6)
    assert completion.token_ids == (11, 12, 13)
    assert completion.logprobs == (-0.5, -0.5, -0.5)
    assert completion.finish_reason == "length"
    assert completion.weight_versions == (3, 3, 3)
    assert completion.routed_experts is None


async def test_greedy_is_temperature_0_and_top_k_0_is_off():
    _, fake = await ask(params=SamplingParams(1, temperature=0.0, top_k=0))
    assert fake.requests[0]["sampling_params"]["temperature"] == 0.0
    assert fake.requests[0]["sampling_params"]["top_k"] == -1


async def test_ids_may_be_numpys():
    completion, fake = await ask(ids=np.array([5, 6]))
    assert fake.requests[0]["input_ids"] == [5, 6]
    assert completion.prompt_ids == (5, 6) and is_answer(completion, 3)


@pytest.mark.parametrize(
    ("ids", "params", "told"),
    [
        ((), PARAMS, "no tokens"),
        ((5, 100, 6), PARAMS, r"Token 1 of the prompt is 100; ids of this model are 0 to 99"),
        ((5, 6, -1), PARAMS, r"Token 2 of the prompt is -1; ids of this model are 0 to 99"),
        ((5, 6.0), PARAMS, r"Token 1 of the prompt is 6.0; ids are integers"),
        ((5,), SamplingParams(0), "max_new_tokens is 0"),
        ((5,) * 40, SamplingParams(25), "prompt of 40 tokens and a response of up to 25 do not fit .* 64"),
    ],
)
async def test_what_would_hurt_a_server_is_not_sent(ids, params, told):
    async with FaultInjectingFake() as fake:
        client = Client(fake.url, "", vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH)
        with pytest.raises(EngineError, match=told):
            await client.generate("rid", ids, params)
        await client.close()
        assert fake.requests == []


async def test_a_request_that_just_fits_is_sent():
    completion, _ = await ask(ids=(99,) * 40, params=SamplingParams(24))
    assert len(completion.token_ids) == 24


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
async def test_the_reason_of_the_end_is_told(reason):
    completion, _ = await ask(meta(finish_reason={"type": reason, "matched": 1}))
    assert completion.finish_reason == reason


async def test_every_token_has_the_version_of_the_weights_that_sampled_it():
    spans = [{"version": "7", "start": 0, "end": 1}, {"version": "8", "start": 1, "end": 3}]
    completion, _ = await ask(meta(weight_versions=spans))
    assert completion.weight_versions == (7, 8, 8)
    completion, _ = await ask(meta(weight_versions=None, weight_version="9"))
    assert completion.weight_versions == (9, 9, 9)
    completion, _ = await ask(meta(weight_version="default", weight_versions=None))
    assert completion.weight_versions == (-1, -1, -1)  # of the model's folder, not of the trainer


async def test_the_experts_of_every_token_but_the_last_are_decoded():
    experts = np.arange(4 * 2 * 2, dtype=np.int32)  # 2 + 3 - 1 tokens, 2 layers, 2 experts
    coded = base64.b64encode(experts.tobytes()).decode()
    completion, fake = await ask(meta(routed_experts=coded), experts_shape=(2, 2))
    assert fake.requests[0]["return_routed_experts"] is True
    assert np.array_equal(completion.routed_experts, experts.reshape(4, 2, 2))
    with pytest.raises(EngineError, match="--enable-return-routed-experts"):
        await ask(None, experts_shape=(2, 2))
    with pytest.raises(EngineError, match="cannot reshape array of size 16"):
        await ask(meta(routed_experts=coded), ids=(1, 2, 3), experts_shape=(2, 2))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (lambda reply: reply | {"output_ids": [11, 12, 14]}, "log-probs of 3 others"),
        (lambda reply: reply | {"output_ids": [11, 12]}, "2 tokens have log-probs of 3 others"),
        (meta(output_token_logprobs=None), "not enough values"),
        (meta(output_token_logprobs=[[-0.5, 11, None], [None, 12, None], [-0.5, 13, None]]), "NoneType"),
        (meta(output_token_logprobs=[[-0.5, 11, None], [math.nan, 12, None], [-0.5, 13, None]]), "not finite"),
        (meta(output_token_logprobs=[[-0.5, 11, None], [-math.inf, 12, None], [-0.5, 13, None]]), "not finite"),
        (meta(finish_reason=None), "NoneType"),
        (meta(finish_reason={"type": "tired"}), "tired"),
        (meta(weight_versions=[{"version": "7", "start": 0, "end": 2}]), "3 tokens have versions of 2"),
        (lambda reply: [reply, reply], "cannot read"),
        (lambda reply: "Service is fine", "Service is fine"),
        (lambda reply: {"error": {"message": "nothing today"}}, "nothing today"),
    ],
)
async def test_a_reply_that_is_not_what_was_asked_for_is_an_error(word, told):
    with pytest.raises(EngineError, match=told) as error:
        await ask(word)
    assert "/generate answered what this client cannot read" in str(error.value)
    assert not isinstance(error.value, ServerLost)


async def test_ids_outside_the_vocabulary_and_more_tokens_than_asked_for_are_errors():
    def scored(ids):
        return lambda reply: {
            "output_ids": ids,
            "meta_info": reply["meta_info"] | {"output_token_logprobs": [[-0.5, token, None] for token in ids]},
        }

    for ids in ([11, 100, 13], [11, -1, 13]):
        with pytest.raises(EngineError, match="outside 0 to 99"):
            await ask(scored(ids))
    with pytest.raises(EngineError, match="4 tokens came, 3 were asked for"):
        await ask(scored([1, 2, 3, 4]))


@pytest.mark.parametrize(
    ("word", "kind", "told"),
    [
        (400, ServerRefused, "/generate answered HTTP 400: .*as told: 400"),
        (500, ServerRefused, "/generate answered HTTP 500: .*as told: 500"),
        (503, ServerBusy, "/generate answered HTTP 503: .*as told: 503"),
        (429, ServerBusy, "/generate answered HTTP 429"),
        ("cut", ServerLost, "did not answer /generate: Server disconnected"),
        ("cut body", ServerLost, "did not answer /generate"),
    ],
)
async def test_faults_are_told_apart(word, kind, told):
    with pytest.raises(kind, match=told) as error:
        await ask(word)
    assert isinstance(error.value, EngineError)
    if kind is ServerRefused:
        assert (error.value.status, error.value.url) == (word, str(error.value).partition("/generate")[0])


async def test_a_control_call_has_a_limit_and_its_reply_may_be_a_sentence():
    async with FaultInjectingFake(["hang", lambda reply: "Cache flushed."]) as fake:
        client = Client(fake.url, "", vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH)
        body = {"rid": "r", "input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
        with pytest.raises(ServerLost, match=r"did not answer /generate: no answer within 0\.2 s"):
            await client.post("/generate", body, timeout_s=0.2)
        assert await client.post("/generate", body) == "Cache flushed."
        with pytest.raises(ServerRefused, match="HTTP 404"):
            await client.get("/no_such_path")
        await client.close()


async def test_nobody_listens():
    client = Client("http://127.0.0.1:9", "", vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH)
    with pytest.raises(ServerLost, match="http://127.0.0.1:9 did not answer /generate"):
        await client.generate("rid", (1,), PARAMS)
    assert not await client.is_up() and not await client.can_generate()
    await client.close()


async def test_a_paused_server_is_up_and_does_not_generate():
    async with FaultInjectingFake() as fake:
        client = Client(fake.url, "", vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, health_timeout_s=0.2)
        assert await client.is_up() and await client.can_generate()
        fake.is_paused = True
        assert await client.is_up() and not await client.can_generate()
        await client.abort("some rid")
        assert fake.aborted == ["some rid"]
        assert json.dumps(await client.get("/model_info")) == '{"weight_version": "3"}'
        await client.close()
