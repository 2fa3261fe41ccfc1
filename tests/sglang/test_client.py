"""Requests to real SGLang servers: what comes back, and what becomes of them when a server pauses, hangs or is killed."""

import asyncio
import os
import random
import signal
import subprocess
import time
import urllib.request
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_pz.engine.sglang.control import Control
from megatron_pz.engine.sglang.faults import ServerRefused
from megatron_pz.engine.sglang.fleet import free_port
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.engine.sglang.pool import Pool
from megatron_pz.engine.sglang.server import ServerSpec
from megatron_pz.errors import EngineError
from megatron_pz.types import SamplingParams

TOLERANCE = 1e-4  # float32; reached: see the figures that the tests print
STOP = 7  # an id that ends a response


@pytest.fixture(scope="module")
def io():
    thread = IoThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def another(launch, dense_model):
    """A second server, for what must not be done to the shared one."""
    served = launch(dense_model)
    yield served
    served.process.stop(at_once=True)


@pytest.fixture(scope="module")
def router(server, another, server_python, tmp_path_factory):
    """An sglang-router in front of both; a client of it."""
    port, log = free_port("127.0.0.1"), tmp_path_factory.mktemp("router") / "router.log"
    command = [str(server_python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", server.url, another.url, "--policy", "round_robin", "--api-key", server.api_key]
    command += ["--disable-retries", "--prometheus-port", str(free_port("127.0.0.1"))]
    with log.open("w") as told, subprocess.Popen(command, stdout=told, stderr=told) as process:
        try:
            until(lambda: is_healthy(f"http://127.0.0.1:{port}/readiness", process), 60)
            yield replace(server, process=RouterAddress(f"http://127.0.0.1:{port}", server.process.spec))
        finally:
            process.terminate()


@dataclass(frozen=True)
class RouterAddress:
    url: str
    spec: ServerSpec


def is_healthy(url, process):
    assert process.poll() is None, "the router ended"
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.fixture
def pooled(io):
    """pooled(server, ...) -> (pool, the servers that `on_lost` was told, what lets it return)."""
    pools = []

    def make(*servers, at_once=64, timeout_s=60.0, health_timeout_s=20.0, router=None):
        clients = [one.client(health_timeout_s=health_timeout_s) for one in servers]
        pool = Pool(clients, at_once, timeout_s, router.client() if router else None)
        lost, back = [], asyncio.Event()

        async def on_lost(server):
            lost.append(server)
            await back.wait()

        pool.on_lost = on_lost
        pools.append(pool)
        return pool, lost, back

    yield make
    for pool in pools:
        io.run(pool.close())


def prompts(count, seed=0, length=24):
    rng = random.Random(seed)
    return [tuple(rng.randrange(10, 500) for _ in range(rng.randrange(8, length))) for _ in range(count)]


async def ask_all(pool, asked, params):
    return await asyncio.gather(*(pool.generate(prompt, params) for prompt in asked))


def under_way(served):
    """Requests that the server works on, or that wait there."""
    load = served.call("/v1/loads")["loads"][0]
    return load["num_running_reqs"] + load["num_waiting_reqs"]


def until(is_so, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tree(pid):
    found = [pid]
    for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split():
        found += tree(int(child))
    return found


@pytest.fixture(scope="module")
def model(dense_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float32).eval()


def log_probs(model, completion, temperature):
    """float32 [response tokens, vocabulary] of the model at each token of the response."""
    ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(completion.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_the_model_at_the_temperature_of_sampling(io, server, pooled, model, temperature):
    pool, _, _ = pooled(server)
    asked = prompts(12)
    params = SamplingParams(24, temperature=temperature, top_p=1.0, top_k=0, stop_token_ids=(STOP,))
    found = io.run(ask_all(pool, asked, params))
    worst = 0.0
    for prompt, completion in zip(asked, found, strict=True):
        assert completion.prompt_ids == prompt
        ended = STOP in completion.token_ids or completion.token_ids[-1] == 1  # the model's own end token
        assert completion.finish_reason == ("stop" if ended else "length")
        assert STOP not in completion.token_ids[:-1] and (ended or len(completion.token_ids) == 24)
        assert completion.weight_versions == (-1,) * len(completion.token_ids)  # nobody has handed it weights
        expected = log_probs(model, completion, temperature or 1.0)
        ids = torch.tensor(completion.token_ids)
        if not temperature:
            best = expected.max(-1).values - expected.gather(1, ids[:, None])[:, 0]
            assert best.max() < TOLERANCE  # greedy, but for a tie
        of_tokens = expected.gather(1, ids[:, None])[:, 0]
        worst = max(worst, float((of_tokens - torch.tensor(completion.logprobs)).abs().max()))
    print(f"\ntemperature {temperature}: largest difference {worst:.1e}")
    assert worst < TOLERANCE
    assert pool.counters.requests == 12 and pool.counters.retries == 0


def test_what_a_server_refuses_is_told_in_its_words_and_what_would_end_it_is_not_sent(io, server, pooled):
    pool, lost, _ = pooled(server)
    with pytest.raises(EngineError, match="Token 1 of the prompt is 512; ids of this model are 0 to 511"):
        io.run(pool.generate((3, server.vocab_size), SamplingParams(1)))
    with pytest.raises(EngineError, match="do not fit the servers' context of 2048"):
        io.run(pool.generate((3,) * 2000, SamplingParams(49)))
    pool.clients[0].context_length = 4096  # as where the settings of trainer and server differ
    with pytest.raises(ServerRefused, match="HTTP 400: .*2048") as refused:
        io.run(pool.generate((3,) * 3000, SamplingParams(1)))
    assert refused.value.status == 400
    assert len(io.run(pool.generate((3,) * 1984, SamplingParams(64))).token_ids) > 0
    assert lost == [] and pool.counters.retries == 0


def test_a_request_that_is_given_up_leaves_the_server(io, server, pooled):
    pool, _, _ = pooled(server)
    futures = [io.submit(pool.generate(prompt, SamplingParams(1900))) for prompt in prompts(6, seed=1)]
    until(lambda: under_way(server) >= 4)
    for future in futures:
        future.cancel()
    began = time.monotonic()
    until(lambda: under_way(server) == 0)
    print(f"\naborted within {time.monotonic() - began:.2f} s")
    assert io.run(pool.generate((5, 6), SamplingParams(1))).finish_reason in ("length", "stop")


def test_no_more_requests_are_under_way_than_the_limit(io, server, pooled):
    pool, _, _ = pooled(server, at_once=3)
    future = io.submit(ask_all(pool, prompts(9, seed=2), SamplingParams(60)))
    most = 0
    while not future.done():
        most = max(most, under_way(server))
    assert len(future.result()) == 9 and 1 <= most <= 3


def test_a_router_in_front_passes_requests_on_to_both_and_answers_as_a_server_does(io, server, another, router, pooled):
    greedy, asked = SamplingParams(40, temperature=0.0), prompts(8, seed=7)
    direct, _, _ = pooled(server)
    expected = io.run(ask_all(direct, asked, greedy))
    pool, lost, _ = pooled(server, another, router=router)
    future = io.submit(ask_all(pool, asked, greedy))
    until(lambda: under_way(server) and under_way(another))
    for found, wanted in zip(future.result(60), expected, strict=True):
        assert (found.prompt_ids, found.token_ids, found.finish_reason) == (
            wanted.prompt_ids,
            wanted.token_ids,
            wanted.finish_reason,
        )
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=TOLERANCE)
    given_up = [io.submit(pool.generate(prompt, SamplingParams(1900))) for prompt in prompts(8, seed=8)]
    until(lambda: 4 <= under_way(server) + under_way(another) <= 8)  # some may draw the end of text early
    for future in given_up:
        future.cancel()
    until(lambda: under_way(server) + under_way(another) == 0)
    assert lost == [] and pool.counters.retries == 0


@pytest.mark.parametrize(
    ("mode", "seconds", "health_timeout_s"), [("retract", 7.0, 5.0), ("in_place", 0.2, 60.0), ("abort", 0.2, 60.0)]
)
def test_a_pause_loses_no_server_and_every_token_tells_its_weights(io, server, pooled, mode, seconds, health_timeout_s):
    """The longest pause is longer than what a server that generates may take; the short ones prove nothing of that."""
    pool, lost, _ = pooled(server, timeout_s=0.5, health_timeout_s=health_timeout_s)
    control = Control(server.client())
    asked = prompts(4, seed=3)
    try:
        future = io.submit(ask_all(pool, asked, SamplingParams(300)))
        until(lambda: under_way(server) == 4)
        pool.is_paused = True
        io.run(control.pause(mode))
        io.run(control.set_weight_version("7"))
        time.sleep(seconds)
        io.run(control.continue_generation())
        pool.is_paused = False
        found = future.result(60)
    finally:
        server.restore()
        io.run(control.client.close())
    assert lost == [] and pool.counters.retries == 0
    for completion in found:
        assert completion.finish_reason in ("length", "stop")
        versions = list(completion.weight_versions)
        assert versions == sorted(versions) and set(versions) <= {-1, 7}
        assert mode != "abort" or len(set(versions)) == 1
    # On a busy machine one may have ended before the pause reached the server.
    of_new = sum(7 in completion.weight_versions for completion in found)
    assert of_new >= 1 and pool.counters.aborted == (of_new if mode == "abort" else 0)


def test_a_server_that_hangs_is_lost_its_requests_move_and_it_comes_back(io, server, another, pooled):
    pool, lost, back = pooled(server, another, timeout_s=1.0, health_timeout_s=6.0)
    stopped = tree(another.pid)
    future = io.submit(ask_all(pool, asked := prompts(12, seed=4), SamplingParams(150)))
    until(lambda: under_way(another) >= 3)
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        found = future.result(60)
        assert lost == [1] and pool.live() == [0]
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert [completion.prompt_ids for completion in found] == asked
    assert pool.counters.tokens == sum(len(completion.token_ids) for completion in found)
    io.loop.call_soon_threadsafe(back.set)
    until(lambda: pool.live() == [0, 1])
    until(lambda: under_way(another) == 0)  # its connections are gone
    found = io.run(ask_all(pool, prompts(8, seed=5), SamplingParams(4)))
    assert len(found) == 8 and lost == [1]


def test_requests_of_a_server_that_is_killed_are_answered_by_the_other_once_each(io, server, another, router, pooled):
    pools = {"asked directly": pooled(server, another), "through a router": pooled(server, another, router=router)}
    asked = prompts(16, seed=6)
    begun = {how: io.submit(ask_all(pool, asked, SamplingParams(150))) for how, (pool, _, _) in pools.items()}
    until(lambda: under_way(another) >= 12)
    os.kill(another.pid, signal.SIGKILL)
    for how, (pool, lost, _) in pools.items():
        found = begun[how].result(60)
        assert [completion.prompt_ids for completion in found] == asked
        assert all(completion.finish_reason in ("length", "stop") for completion in found)
        assert lost == [1] and pool.live() == [0]
        counters = pool.counters
        print(f"\n{how}: {counters.retries} of {counters.requests} requests were asked again")
        # All are, at the worst, through a router: it does not say which server has which.
        assert counters.requests == 16 and 3 <= counters.retries <= (16 if "router" in how else 8)
        assert counters.tokens == sum(len(completion.token_ids) for completion in found)
