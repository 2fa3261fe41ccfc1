"""What the SGLang engine does when servers are lost and weights change, with scripted servers (engine/sglang/engine.py).

The scripted servers are no SGLang: they die at chosen moments. Real ones: tests/sglang.
"""

import asyncio
import threading

import pytest

from megatron_pz.engine.sglang.engine import MAX_PUSHES, SGLangEngine
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.errors import EngineError
from megatron_pz.types import Completion, SamplingParams

PARAMS = SamplingParams(max_new_tokens=1)


class ScriptedServers:
    """Answer with the version that was pushed last; `dies` names the requests at which the server they go to is lost."""

    def __init__(self, num=2, dies=()):
        self.num, self.dies, self.log = num, set(dies), []
        self.down, self.versions, self.on_lost = {}, {}, None
        self.answered, self.failure = [], None

    async def generate(self, prompt_ids, params):
        (name,) = prompt_ids
        await asyncio.sleep(0.001)
        while True:
            if self.failure:
                raise self.failure
            while not self.live() and not self.failure:
                await asyncio.sleep(0.001)
            if self.failure:
                continue
            server = self.live()[name % len(self.live())]
            if name in self.dies:
                self.dies.discard(name)
                await self.mark_lost(server)
                continue
            self.answered.append((name, server))
            return Completion(prompt_ids, (0,), (-0.1,), "stop", (self.versions[server],))

    async def mark_lost(self, server):
        if server not in self.down:
            self.log.append(f"lost {server}")
            self.versions.pop(server, None)
            self.down[server] = asyncio.ensure_future(self._return(server))

    async def _return(self, server):
        try:
            await self.on_lost(server)
            del self.down[server]
        except EngineError as error:
            self.failure = error

    def live(self):
        return [server for server in range(self.num) if server not in self.down]

    def lap(self):
        return {"engine/servers_live": float(len(self.live()))}

    async def close(self):
        self.log.append("closed")


class OneRank:
    rank = 0

    def broadcast(self, thing):
        return thing


@pytest.fixture
def make():
    engines = []

    def engine(servers, refuses=(), fails=False):
        """`refuses`: for each push in turn, the servers that do not take it."""
        turns = iter(refuses)

        def push(weights, version, to):
            broken = [server for server in next(turns, ()) if server in to]
            servers.log.append(f"push {version} to {to}" + (f" not {broken}" if broken else ""))
            servers.versions.update({server: version for server in to if server not in broken})
            return broken

        async def restart(server):
            servers.log.append(f"restart {server}")
            await asyncio.sleep(0.01)
            if fails:
                raise EngineError("the disk is full, says the server")

        engines.append(SGLangEngine(OneRank(), push, IoThread(), servers, restart))
        return engines[-1]

    yield engine
    for one in engines:
        one.close()


def ask(engine, names):
    async def conversation():
        return await asyncio.gather(*(engine.generate((name,), PARAMS) for name in names))

    return conversation


def test_a_conversation_goes_on_while_the_main_thread_does_something_else(make):
    servers, gone_on = ScriptedServers(), threading.Event()
    engine = make(servers)
    engine.load("weights", 7)

    async def conversation():
        gone_on.set()
        return (await engine.generate((1,), PARAMS)).weight_versions

    begun = engine.begin(conversation)
    assert gone_on.wait(5)
    assert engine.finish(begun) == (7,)
    assert engine.version == 7


def test_a_lost_server_is_restarted_gets_the_weights_and_each_request_is_answered_once(make):
    servers = ScriptedServers(dies=(3,))
    engine = make(servers)
    engine.load("weights", 1)
    found = engine.finish(engine.begin(ask(engine, range(20))))
    assert sorted(name for name, _ in servers.answered) == list(range(20))
    assert all(completion.weight_versions == (1,) for completion in found)
    assert servers.log[:3] == ["push 1 to [0, 1]", "lost 1", "restart 1"]
    while servers.down:  # it may come back after the conversation
        engine.finish(engine.begin(ask(engine, [100])))
    assert servers.log[3:] == ["push 1 to [1]"]
    engine.load("weights", 2)
    assert servers.log[4:] == ["push 2 to [0, 1]"]


def test_where_all_servers_are_lost_the_requests_wait_for_the_first_to_come_back(make):
    servers = ScriptedServers(num=1, dies=(0, 5))
    engine = make(servers)
    engine.load("weights", 4)
    found = engine.finish(engine.begin(ask(engine, range(10))))
    assert [completion.weight_versions for completion in found] == [(4,)] * 10
    assert servers.log.count("restart 0") == servers.log.count("push 4 to [0]") - 1 >= 1


def test_a_server_that_does_not_take_its_weights_is_restarted_and_never_keeps_half_of_them(make):
    servers = ScriptedServers()
    engine = make(servers, refuses=[(), (1,), (1,)])
    engine.load("weights", 1)
    engine.load("weights", 2)
    assert servers.log == [
        "push 1 to [0, 1]",
        "push 2 to [0, 1] not [1]",
        "lost 1",
        "restart 1",
        "push 2 to [1] not [1]",
        "restart 1",
        "push 2 to [1]",
    ]
    found = engine.finish(engine.begin(ask(engine, range(8))))
    assert {completion.weight_versions for completion in found} == {(2,)}
    assert {server for _, server in servers.answered} == {0, 1}


def test_after_too_many_attempts_the_error_names_the_server(make):
    engine = make(ScriptedServers(), refuses=[(0,)] * MAX_PUSHES)
    with pytest.raises(EngineError, match=r"version 3 were not taken by server 0 in 3 attempts.*logs/"):
        engine.load("weights", 3)


def test_a_server_that_cannot_be_restarted_ends_the_conversation_with_its_own_words(make):
    servers = ScriptedServers(num=1, dies=(0,))
    engine = make(servers, fails=True)
    engine.load("weights", 1)

    async def conversation():
        await engine.generate((0,), PARAMS)

    begun = engine.begin(conversation)
    with pytest.raises(EngineError, match="the disk is full"):
        engine.finish(begun)


def test_an_error_in_the_game_arrives_as_itself(make):
    engine = make(ScriptedServers())
    engine.load("weights", 1)

    async def conversation():
        raise KeyError("what")

    with pytest.raises(KeyError, match="what"):
        engine.finish(engine.begin(conversation))


def test_without_weights_nothing_is_sampled(make):
    engine = make(ScriptedServers())
    with pytest.raises(EngineError, match="no weights yet"):
        engine.finish(engine.begin(ask(engine, [1])))


def test_two_conversations_may_be_under_way_and_are_finished_in_any_order(make):
    servers = ScriptedServers()
    engine = make(servers)
    engine.load("weights", 1)
    first, second = engine.begin(ask(engine, range(5))), engine.begin(ask(engine, range(5, 9)))
    assert len(engine.finish(second)) == 4
    assert len(engine.finish(first)) == 5
