"""What a pool makes of servers that fail: each request has one answer (engine/sglang/pool.py).

The servers are fakes that fail at chosen moments; real ones are killed and stopped in tests/sglang/test_client.py.
"""

import asyncio
import time

import pytest
from fault_injecting_fake import FakeServer, answer, changed, cut_before, cut_within, expected, hang, late, refuse

from megatron_pz.engine.sglang import pool as pool_module
from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.faults import ServerRefused
from megatron_pz.engine.sglang.pool import Patience, Pool
from megatron_pz.errors import EngineError
from megatron_pz.types import SamplingParams

PARAMS = SamplingParams(max_new_tokens=3)
SOON_S = 20.0  # far more than anything here takes


PATIENCE = Patience(tries=6, first_pause_s=0.01, longest_pause_s=0.05, examinations=3)


NOT_NOW = refuse(503, "as told")
GIVEN_UP = changed(lambda reply: reply["meta_info"].update(finish_reason={"type": "abort", "message": "Aborted"}))


def when(event, then=answer):
    """Waits for `event`, as a paused server does, and goes on as `then`."""

    async def behave(fake, request, reply):
        await event.wait()
        return await then(fake, request, reply)

    return behave


def client_of(fake):
    return Client(fake.url, "", vocab_size=100, context_length=64, health_timeout_s=0.3)


class Pooled:
    """Fakes with these scripts, and a pool over them; `lost` is what `on_lost` was told, and `back` lets it return."""

    def __init__(self, *scripts, at_once=64, timeout_s=30.0, router=False):
        self.fakes = [FakeServer() for _ in scripts]
        for fake, script in zip(self.fakes, scripts, strict=True):
            fake.next += script
        self.lost, self.back = [], asyncio.Event()
        self._how = (at_once, timeout_s, router)

    async def __aenter__(self):
        at_once, timeout_s, router = self._how
        for fake in self.fakes:
            await fake.__aenter__()
        clients = [client_of(fake) for fake in self.fakes]
        front = clients.pop(0) if router else None  # the first fake is the router
        self.pool = Pool(clients, at_once, timeout_s, front, PATIENCE)
        self.pool.on_lost = self._on_lost
        return self

    async def __aexit__(self, *_):
        await self.pool.close()
        for fake in self.fakes:
            await fake.kill()

    async def _on_lost(self, server):
        self.lost.append(server)
        await self.back.wait()

    def ask(self, *prompts):
        """A task for each prompt."""
        return [asyncio.ensure_future(self.pool.generate((prompt,), PARAMS)) for prompt in prompts]


async def gathered(tasks):
    """Prompts that were answered, in the order of the tasks; each answer is the one to its prompt."""
    found = await asyncio.wait_for(asyncio.gather(*tasks), SOON_S)
    assert all(completion == expected(completion.prompt_ids, PARAMS) for completion in found)
    return [prompt for completion in found for prompt in completion.prompt_ids]


async def until(is_so):
    deadline = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_faults_of_the_connection_are_tried_again_and_each_request_has_one_answer():
    async with Pooled([NOT_NOW, cut_before, cut_within, NOT_NOW]) as it:
        assert await gathered(it.ask(*range(20))) == list(range(20))
        assert len(it.fakes[0].received) == 24
        rids = [request["rid"] for request in it.fakes[0].received]
        assert len(set(rids)) == 24  # an answer that comes late is nobody's
        counters = it.pool.counters
        assert (counters.requests, counters.retries, counters.tokens, counters.lost) == (20, 4, 60, 0)
        assert it.lost == []


@pytest.mark.parametrize("status", [400, 401, 500])
async def test_what_a_server_refuses_is_an_error_at_once(status):
    async with Pooled([refuse(status, "as told")]) as it:
        with pytest.raises(ServerRefused, match=f"{it.fakes[0].url}/generate answered HTTP {status}: .*as told"):
            await gathered(it.ask(1))
        assert len(it.fakes[0].received) == 1
        assert it.fakes[0].num_examined == 0


async def test_after_too_many_faults_the_error_tells_server_tries_and_the_last_fault():
    async with Pooled([cut_before] * (PATIENCE.tries - 1) + [NOT_NOW]) as it:
        with pytest.raises(
            EngineError, match=rf"failed {PATIENCE.tries} times.*{it.fakes[0].url}/generate answered HTTP 503"
        ):
            await gathered(it.ask(1))
        assert it.pool.counters.retries == PATIENCE.tries - 1
        assert len(it.fakes[0].received) == PATIENCE.tries


async def test_pauses_grow_up_to_a_limit_and_vary(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    async with Pooled([NOT_NOW] * (PATIENCE.tries - 1)) as it:
        monkeypatch.setattr(pool_module.asyncio, "sleep", sleep)
        await gathered(it.ask(1))
    limits = [0.01, 0.02, 0.04, 0.05, 0.05]
    slept = [seconds for seconds in slept if seconds > 0.001]  # the fake sleeps too
    assert all(limit / 2 <= seconds <= limit for seconds, limit in zip(slept, limits, strict=True))
    assert len({seconds / limit for seconds, limit in zip(slept, limits, strict=True)}) > 1


async def test_no_more_requests_are_under_way_than_the_limit():
    async with Pooled([late(0.02)] * 30, at_once=4) as it:
        await gathered(it.ask(*range(30)))
        assert it.fakes[0].most_under_way == 4


async def test_a_server_that_is_slow_gets_less_to_do():
    async with Pooled([late(0.2)] * 100, [late(0.01)] * 100, at_once=8) as it:
        await gathered(it.ask(*range(60)))
        slow, fast = (len(fake.received) for fake in it.fakes)
        assert slow + fast == 60 and fast > 2 * slow
        assert it.pool.in_flight == [0, 0]


async def test_who_stops_waiting_has_the_server_give_the_request_up():
    async with Pooled([hang, hang], at_once=1) as it:
        first, second = it.ask(1, 2)
        await until(lambda: it.fakes[0].received)
        first.cancel()
        await until(lambda: it.fakes[0].aborted)
        assert it.fakes[0].aborted == [it.fakes[0].received[0]["rid"]]
        await until(lambda: len(it.fakes[0].received) == 2)  # its place is free
        second.cancel()
        await until(lambda: len(it.fakes[0].aborted) == 2)
        assert it.pool.in_flight == [0]


async def test_an_invalid_request_is_refused_and_takes_no_place():
    async with Pooled([], at_once=1) as it:
        for _ in range(3):
            with pytest.raises(EngineError, match="Token 0 of the prompt is 100"):
                await gathered(it.ask(100))
        assert await gathered(it.ask(1)) == [1]
        assert len(it.fakes[0].received) == 1


async def test_a_server_that_hangs_is_lost_once_and_all_its_requests_move():
    async with Pooled([hang] * 100, [], timeout_s=0.2) as it:
        it.fakes[0].health = None
        assert await gathered(it.ask(*range(16))) == list(range(16))
        assert it.lost == [0] and it.pool.live() == [1]
        assert it.pool.counters.lost == 1
        told = it.pool.lap()
        assert (told["engine/servers_lost"], told["engine/servers_live"], told["engine/retries"]) == (1, 1, 8)
        assert sum(it.pool.lap().values()) == 1  # since then: nothing but the server that lives
        assert len(it.fakes[0].received) == 8
        assert len(it.fakes[1].received) == 16  # 8 of its own
        assert it.fakes[0].num_examined == 1
        it.back.set()
        await until(lambda: it.pool.live() == [0, 1])


async def test_a_server_that_died_is_lost_and_without_another_requests_wait_for_its_return():
    async with Pooled([hang] * 6) as it:
        tasks = it.ask(*range(6))
        await until(lambda: len(it.fakes[0].received) == 6)
        await it.fakes[0].kill()
        await until(lambda: it.lost)
        tasks += it.ask(6)
        done, _ = await asyncio.wait(tasks, timeout=0.2)
        assert not done
        it.fakes[0].next.clear()
        await it.fakes[0].start()
        it.back.set()
        assert await gathered(tasks) == list(range(7))
        assert it.lost == [0]
        assert len(it.fakes[0].received) == 6 + 7


async def test_requests_of_a_server_that_others_found_lost_move_at_once():
    async with Pooled([hang] * 100, [], timeout_s=30) as it:
        tasks = it.ask(*range(10))
        await until(lambda: len(it.fakes[0].received) == 5)
        await it.pool.mark_lost(0)  # weights could not be handed to it
        await it.pool.mark_lost(0)
        assert await gathered(tasks) == list(range(10))
        assert it.lost == [0] and it.pool.counters.tokens == 30


async def test_a_server_that_does_not_come_back_is_left_out_and_without_another_its_words_are_told():
    async with Pooled([hang], [], timeout_s=0.1) as it:
        for fake in it.fakes:
            fake.health = None

        async def fails(server):
            raise EngineError(f"no memory for {server}")

        it.pool.on_lost = fails
        assert await gathered(it.ask(1)) == [1]
        assert it.pool.live() == [1]
        await it.pool.mark_lost(1)
        with pytest.raises(EngineError, match="no memory for 0"):
            await gathered(it.ask(1))


async def test_servers_that_nobody_can_bring_back():
    async with Pooled([]) as it:
        it.pool.on_lost = None
        await it.fakes[0].kill()
        with pytest.raises(EngineError, match="was lost, and nobody brings it back"):
            await gathered(it.ask(1))


async def test_a_paused_server_is_well_and_requests_wait():
    go_on = asyncio.Event()
    async with Pooled([when(go_on), when(go_on)], timeout_s=0.05) as it:
        early = it.ask(1, 2)
        await until(lambda: len(it.fakes[0].received) == 2)
        it.pool.is_paused, it.fakes[0].health = True, None
        late_one = it.ask(3)
        await asyncio.sleep(0.5)  # ten times the limit, and longer than an examination
        assert len(it.fakes[0].received) == 2  # nothing is sent meanwhile
        it.fakes[0].health, it.pool.is_paused = 200, False
        go_on.set()
        assert await gathered(early + late_one) == [1, 2, 3]
        assert it.lost == [] and it.pool.counters.retries == 0
        assert len(it.fakes[0].received) == 3


async def test_a_pause_that_begins_while_a_server_is_examined_does_not_lose_it():
    async with Pooled([hang, hang], timeout_s=0.1) as it:
        it.fakes[0].health = None
        tasks = it.ask(1)
        await until(lambda: it.fakes[0].num_examined)
        it.pool.is_paused = True
        await asyncio.sleep(0.4)  # longer than an examination
        it.fakes[0].health, it.pool.is_paused = 200, False
        await asyncio.sleep(0.2)
        assert it.lost == [] and not tasks[0].done()
        tasks[0].cancel()


async def test_responses_that_were_given_up_for_new_weights_are_asked_for_again():
    go_on = asyncio.Event()
    async with Pooled([when(go_on), when(go_on, GIVEN_UP)]) as it:
        tasks = it.ask(1, 2)
        await until(lambda: len(it.fakes[0].received) == 2)
        it.pool.is_paused = True
        go_on.set()
        await until(lambda: it.pool.counters.aborted)
        await asyncio.sleep(0.05)
        assert len(it.fakes[0].received) == 2  # weights have not arrived
        it.pool.is_paused = False
        assert await gathered(tasks) == [1, 2]
        assert (it.pool.counters.aborted, it.pool.counters.retries, it.pool.counters.tokens) == (1, 0, 6)


async def test_a_server_that_gives_everything_up_unasked_is_no_endless_loop():
    async with Pooled([GIVEN_UP] * 100) as it:
        with pytest.raises(EngineError, match=rf"failed {PATIENCE.tries} times.*gave a request up that nobody aborted"):
            await gathered(it.ask(1))
        assert it.pool.counters.aborted == len(it.fakes[0].received) == PATIENCE.tries


async def test_a_request_that_never_ends_on_a_server_that_is_well_is_aborted_and_asked_again():
    async with Pooled([hang], timeout_s=0.05) as it:
        assert await gathered(it.ask(1)) == [1]
        assert it.lost == [] and it.pool.counters.retries == 1
        assert it.fakes[0].aborted == [it.fakes[0].received[0]["rid"]]
        assert it.fakes[0].num_examined == 4  # and once more for the fault


async def test_closing_has_the_servers_give_everything_up():
    async with Pooled([hang] * 5) as it:
        tasks = it.ask(*range(5))
        await until(lambda: len(it.fakes[0].received) == 5)
        await it.pool.close()
        assert sorted(it.fakes[0].aborted) == sorted(request["rid"] for request in it.fakes[0].received)
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(found, asyncio.CancelledError | EngineError)


async def test_requests_go_through_the_router_and_aborts_to_every_server():
    async with Pooled([answer, hang], [], [], router=True) as it:
        router, *workers = it.fakes
        assert await gathered(it.ask(1)) == [1]
        (task,) = it.ask(2)
        await until(lambda: len(router.received) == 2)
        task.cancel()
        rid = router.received[1]["rid"]
        await until(lambda: [worker.aborted for worker in workers] == [[rid], [rid]])
        assert router.aborted == [] and not workers[0].received and not workers[1].received


async def test_a_routers_error_counts_as_a_fault_only_where_a_server_was_lost():
    async with Pooled([refuse(500, "as told")], [], [], router=True) as it:
        with pytest.raises(ServerRefused, match="HTTP 500"):
            await gathered(it.ask(1))
        assert it.lost == []
    async with Pooled([refuse(500, "as told"), cut_before], [], [], router=True) as it:
        router, dead, well = it.fakes
        await dead.kill()
        assert await gathered(it.ask(1, 2)) == [1, 2]
        assert it.lost == [0]
        assert (
            len(router.received) == 2 and len(well.received) == 2
        )  # directly, while the router may choose the dead one
        it.back.set()
        await until(lambda: it.pool.live() == [0, 1])
        assert await gathered(it.ask(3)) == [3]
        assert len(router.received) == 3


async def test_a_request_that_hangs_behind_a_router_is_asked_again_when_a_server_was_lost():
    async with Pooled([hang], [], [], router=True, timeout_s=0.1) as it:
        it.fakes[1].health = None
        assert await gathered(it.ask(1)) == [1]
        assert it.lost == [0]
        rid = it.fakes[0].received[0]["rid"]
        await until(lambda: it.fakes[2].aborted == [rid])
