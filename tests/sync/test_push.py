"""Buckets are bounded, and a push leaves out the server at which anything fails (sync/buckets.py, push.py, tensor.py).

The scripted server answers like SGLang's HTTP interface and has no model; real ones: tests/sglang/test_weight_sync.py.
"""

import asyncio
import base64
import json
import pickle
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.engine.sglang.control import Control
from megatron_pz.engine.sglang.faults import ServerLost, ServerRefused
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.errors import ModelError
from megatron_pz.sync import push as push_module
from megatron_pz.sync.buckets import buckets
from megatron_pz.sync.push import WeightPush
from megatron_pz.sync.tensor import TensorTransport


class ScriptedClient:
    """Writes down what it is told; `fails` is an error for a path."""

    url = "http://scripted"

    def __init__(self, fails=None, reads=True):
        self.reads = reads
        self.fails, self.paths, self.tensors, self.version = fails or {}, [], {}, "default"

    async def post(self, path, body, timeout_s=None):
        await asyncio.sleep(0)
        self.paths.append(path)
        if path in self.fails:
            raise self.fails[path]
        text = json.dumps(body).encode()  # as it goes over the wire
        if path == "/update_weights_from_tensor" and self.reads:
            found = json.loads(text)
            assert found["load_format"] == "flattened_bucket"
            flat = pickle.loads(base64.b64decode(found["serialized_named_tensors"][0]))
            for place in flat["metadata"]:
                run = flat["flattened_tensor"][place.start_idx : place.end_idx]
                self.tensors[place.name] = float(run.view(place.dtype).reshape(place.shape).sum())
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return {"success": True}

    async def get(self, path, timeout_s=None):
        return {"weight_version": self.version}


@pytest.fixture(scope="module")
def io():
    thread = IoThread()
    yield thread
    thread.close()


def weights(sizes):
    return [(f"w{index}", torch.full((size,), float(index))) for index, size in enumerate(sizes)]


def pushed(io, clients, tensors, bucket_bytes=5600, version=3, paused=lambda is_paused: None):
    transport = TensorTransport(lambda given: iter(given), bucket_bytes)
    push = WeightPush(transport, io, [Control(client) for client in clients], "retract", paused)
    return push(tensors, version, list(range(len(clients)))), push.last


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(4, 120))
def test_buckets_keep_the_order_and_the_bound(sizes, max_bytes):
    found = list(buckets(weights(sizes), max_bytes))
    assert [name for bucket in found for name, _ in bucket] == [f"w{index}" for index in range(len(sizes))]
    for bucket in found:
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= max_bytes
    for one, other in zip(found, found[1:], strict=False):  # as few as there can be in this order
        assert sum(tensor.nbytes for _, tensor in one) + other[0][1].nbytes > max_bytes


def test_a_bucket_has_one_dtype():
    """Else a float32 tensor might begin where no float32 can."""
    mixed = [("a", torch.ones(3, dtype=torch.bfloat16)), ("b", torch.ones(2)), ("c", torch.ones(2))]
    assert [[name for name, _ in bucket] for bucket in buckets(mixed, 1000)] == [["a"], ["b", "c"]]


def test_dtypes_that_come_by_turns_share_few_buckets_and_the_bound():
    """FP8 weights and their scales: a request for each would be thousands."""
    fp8 = torch.float8_e4m3fn
    turns = [(f"w{n}", torch.ones(100).to(fp8)) if n % 2 == 0 else (f"w{n}", torch.ones(2)) for n in range(20)]
    found = list(buckets(turns, 460))
    assert [[name for name, _ in bucket] for bucket in found] == [
        *(["w0", "w2", "w4", "w6"], ["w8", "w10", "w12", "w14"], [f"w{n}" for n in range(1, 20, 2)], ["w16", "w18"]),
    ]


def test_weights_that_do_not_fit_are_refused_before_a_server_hears_of_them(io):
    def examine(weights):
        raise ModelError("missing")

    client = ScriptedClient()
    transport = TensorTransport(lambda given: iter(given), 5600)
    push = WeightPush(transport, io, [Control(client)], "retract", examine=examine)
    with pytest.raises(ModelError):
        push(weights([1]), 1, [0])
    assert client.paths == []


def test_a_push_pauses_sends_flushes_stamps_and_goes_on(io):
    client, states = ScriptedClient(), []
    broken, report = pushed(io, [client], weights([100] * 5), 5600, paused=states.append)
    assert broken == [] and states == [True, False]
    assert client.tensors == {f"w{index}": 100.0 * index for index in range(5)}
    assert client.paths == [
        "/pause_generation",
        "/begin_weight_update",
        *["/update_weights_from_tensor"] * 3,  # 800 bytes a bucket: two tensors
        "/end_weight_update",
        "/flush_cache",
        "/update_weight_version",
        "/continue_generation",
    ]
    assert (report.num_bytes, report.largest_bucket_bytes, client.version) == (2000, 800, "3")


@pytest.mark.parametrize("has_prefixes", [True, False])
def test_a_pause_in_place_ends_when_the_old_prefixes_are_forgotten(io, monkeypatch, has_prefixes):
    monkeypatch.setattr(push_module, "IDLE_INTERVAL_S", 0.0)

    class Busy(ScriptedClient):
        """Two requests are still under way when the push is done."""

        async def post(self, path, body, timeout_s=None):
            found = await super().post(path, body, timeout_s)
            if path == "/flush_cache" and self.paths.count(path) < 3:
                raise ServerRefused("u", path, 400, "requests run")
            return found

        async def get(self, path, timeout_s=None):
            return await super().get(path) | {"disable_radix_cache": not has_prefixes}

    client, states = Busy(), []
    transport = TensorTransport(lambda given: iter(given), 5600)
    push = WeightPush(
        transport, io, [Control(client)], "in_place", lambda paused: states.append((paused, *client.paths))
    )
    assert push(weights([10]), 3, [0]) == []
    after_continue = ["/flush_cache"] * 3 if has_prefixes else []
    assert client.paths[-1 - len(after_continue) :] == ["/continue_generation", *after_continue]
    assert [state[0] for state in states] == [True, False]
    assert states[1][1:] == tuple(client.paths)  # nothing new is sent before


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/pause_generation", ServerLost("gone")),
        ("/begin_weight_update", ServerLost("gone")),
        ("/update_weights_from_tensor", ServerLost("gone")),
        ("/end_weight_update", ServerLost("gone")),
        ("/flush_cache", ServerRefused("u", "/flush_cache", 400, "requests run")),
        ("/update_weight_version", ServerLost("gone")),
        ("/continue_generation", ServerLost("gone")),
    ],
)
def test_a_server_that_fails_anywhere_is_reported_and_told_nothing_more(io, path, fault):
    bad, good = ScriptedClient({path: fault}), ScriptedClient()
    broken, report = pushed(io, [bad, good], weights([100] * 5))
    assert broken == [0] and report.faults == {0: fault}
    assert bad.paths[-1] == path and bad.paths.count(path) == 1
    assert good.version == "3" and len(good.tensors) == 5


class Left(ScriptedClient):
    """A server that outlived a trainer, which was killed while it handed weights over."""

    is_open = True

    async def post(self, path, body, timeout_s=None):
        found = await super().post(path, body, timeout_s)
        if path in ("/begin_weight_update", "/end_weight_update"):
            if self.is_open == (path == "/begin_weight_update"):
                raise ServerRefused("u", path, 400, "a session is open" if self.is_open else "no session is open")
            self.is_open = not self.is_open
        return found


def test_an_update_that_a_killed_trainer_left_open_is_ended_first(io):
    client = Left()
    broken, _ = pushed(io, [client], weights([100] * 5), 5600)
    assert broken == [] and not client.is_open
    assert client.tensors == {f"w{index}": 100.0 * index for index in range(5)}
    assert client.paths[1:4] == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]


def test_a_server_that_refuses_an_update_with_none_open_is_reported_with_its_first_words(io):
    refused = {path: ServerRefused("u", path, 400, "no") for path in ("/begin_weight_update", "/end_weight_update")}
    client = ScriptedClient(refused)
    broken, report = pushed(io, [client], weights([10]))
    assert broken == [0] and report.faults == {0: refused["/begin_weight_update"]}
    assert client.paths[-1] == "/end_weight_update"


def test_a_server_that_stays_at_its_version_is_reported(io):
    class Stubborn(ScriptedClient):
        async def get(self, path, timeout_s=None):
            return {"weight_version": "2"}

    broken, report = pushed(io, [Stubborn()], weights([10]))
    assert broken == [0] and "has weights of version 2; 3 were handed over" in str(report.faults[0])


def test_what_is_under_way_stays_within_the_bound(io):
    tensors, bound = weights([20_000] * 40), 1_200_000  # 3.2 MB in all

    def peak_with(bucket_bytes):
        client = ScriptedClient(reads=False)  # the server's own memory does not count
        pushed(io, [client], tensors[:2], bucket_bytes)
        tracemalloc.start()  # knows of all bytes and strings; torch's own copies, two of the seven, are not seen
        pushed(io, [client], tensors, bucket_bytes)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_with(bound) < bound * 5 / 7 + 100_000
    assert peak_with(10 * bound) > 2 * bound  # so the measure sees what it should
