"""New weights reach a real server by every transport, and are the trainer's (sync/, engine/sglang/control.py)."""

import asyncio
import base64
import json
import pickle
import time
from pathlib import Path

import pytest
import sglang_models

from megatron_pz.config.schema import Config, ModelConfig
from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.control import Control
from megatron_pz.engine.sglang.engine import SGLangEngine
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.engine.sglang.pool import Pool
from megatron_pz.platform.select import select_platform
from megatron_pz.types import SamplingParams

PLATFORM = select_platform("cpu")  # before Megatron is imported

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megatron_pz.checkpoint.hf_export import export_hf  # noqa: E402
from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.models.policy import build_policy  # noqa: E402
from megatron_pz.sync.collective import CollectiveTransport, make_stages  # noqa: E402
from megatron_pz.sync.disk import DiskTransport  # noqa: E402
from megatron_pz.sync.expected import check_export  # noqa: E402
from megatron_pz.sync.export import iterate_hf_tensors  # noqa: E402
from megatron_pz.sync.handles import HandleTransport  # noqa: E402
from megatron_pz.sync.push import WeightPush  # noqa: E402
from megatron_pz.sync.tensor import TensorTransport  # noqa: E402
from megatron_pz.sync.verify import Verifier  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402

TOLERANCE = 1e-4  # float32; reached: see the figures that the tests print
BUCKET_BYTES = 200_000  # several buckets
PROMPTS = [tuple(range(3 + start, 40 + 2 * start)) for start in range(6)]


@pytest.fixture(scope="module")
def parallel():
    yield init_parallel(Config().parallel, PLATFORM, seed=1)
    shutdown()


@pytest.fixture(scope="module")
def io():
    thread = IoThread()
    yield thread
    thread.close()


def policy(folder: Path):
    model = build_policy(
        json.loads((folder / "config.json").read_text()), Config(model=ModelConfig(hf_model=str(folder))), PLATFORM
    )
    load_hf_weights([model], folder)
    return [model]


def transport(kind, parallel, io, tmp_path, folder):
    if kind == "disk":
        return DiskTransport(
            lambda weights, to: export_hf(weights, folder, to), tmp_path / "weights", True, flushes=True
        )
    if kind == "handles":
        cpu = torch.device("cpu")
        return HandleTransport(iterate_hf_tensors, BUCKET_BYTES, [(0,)], cpu, parallel.control_group, io)
    if kind == "tensor":
        return TensorTransport(iterate_hf_tensors, BUCKET_BYTES)
    return CollectiveTransport(
        lambda weights, stage: iterate_hf_tensors(weights, stage.group, stage.speaker),
        make_stages(0, parallel.control_group),
        parallel.control_group,
        BUCKET_BYTES,
        backend="gloo",
        server_ranks=1,
        io=io,
        host="127.0.0.1",
        device=torch.device("cpu"),
        timeout_s=100,
    )


def answers(io, served, num_tokens=24):
    """Sampled responses to PROMPTS."""
    client = served.client()

    async def ask():
        params = SamplingParams(max_new_tokens=num_tokens, temperature=1.0)
        found = await asyncio.gather(*(client.generate(f"r{i}", ids, params) for i, ids in enumerate(PROMPTS)))
        await client.close()
        return found

    return io.run(ask())


def largest_difference(completions, folder):
    """Between the server's log-probs and those of `transformers` for the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst = 0.0
    for completion in completions:
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        start = len(completion.prompt_ids)
        found = log_probs[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]
        worst = max(worst, float((found - torch.tensor(completion.logprobs)).abs().max()))
    return worst


@pytest.mark.parametrize("kind", ["disk", "tensor", "handles", "distributed"])
def test_a_server_samples_from_the_weights_that_were_handed_over(server, parallel, io, tmp_path, kind):
    first, second = (sglang_models.make_dense(tmp_path / f"m{seed}", seed=seed) for seed in (11, 12))
    control = Control(server.client())
    push = WeightPush(transport(kind, parallel, io, tmp_path, first), io, [control], "retract")
    try:
        for version, folder in ((3, first), (4, second), (5, first)):
            assert push(policy(folder), version, [0]) == [], push.last
            found = answers(io, server)
            difference = largest_difference(found, folder)
            print(f"\n{kind}: largest difference {difference:.1e}, {push.last}")
            assert difference < TOLERANCE
            assert {stamp for completion in found for stamp in completion.weight_versions} == {version}
        assert largest_difference(found, second) > 0.1  # so the comparison can fail
        if kind != "disk":
            assert push.last.largest_bucket_bytes <= max(BUCKET_BYTES, 512 * 128 * 4)  # the embedding goes alone
    finally:
        io.run(control.client.close())
        server.restore()


@pytest.mark.parametrize("kind", ["tensor", "distributed"])
def test_a_server_of_a_mixture_of_experts_does_too(moe_server, parallel, io, tmp_path, kind):
    first, second = (sglang_models.make_moe(tmp_path / f"m{seed}", seed=seed) for seed in (21, 22))
    control = Control(moe_server.client())
    verify = Verifier(range(1, 17), iterate_hf_tensors, pytest.fail)
    way = transport(kind, parallel, io, tmp_path, first)
    push = WeightPush(way, io, [control], "retract", verify=verify, examine=check_export)
    try:
        for version, folder in ((3, first), (4, second)):
            assert push(policy(folder), version, [0]) == [], push.last
            found = answers(io, moe_server)
            difference = largest_difference(found, folder)
            print(f"\nMoE, {kind}: largest difference {difference:.1e}, {push.last}")
            assert difference < TOLERANCE
        assert largest_difference(found, first) > 0.1
    finally:
        io.run(control.client.close())
        moe_server.restore()


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_requests_under_way_go_on_with_the_new_weights_or_are_given_up(server, parallel, io, tmp_path, mode):
    before, after = (sglang_models.make_dense(tmp_path / f"m{seed}", seed=seed) for seed in (13, 16))
    control, client = Control(server.client()), server.client()
    push = WeightPush(TensorTransport(iterate_hf_tensors, BUCKET_BYTES), io, [control], mode)
    params = SamplingParams(max_new_tokens=900, temperature=1.0)
    try:
        assert push(policy(before), 1, [0]) == []
        asked = [io.submit(client.generate(f"long{i}", PROMPTS[i], params)) for i in range(3)]
        io.run(asyncio.sleep(1.5))
        assert push(policy(after), 2, [0]) == []
        found = [one.result(timeout=120) for one in asked]
        versions = [sorted(set(completion.weight_versions)) for completion in found]
        reasons = {completion.finish_reason for completion in found}
        print(f"\n{mode}: {versions} {reasons} {[len(completion.token_ids) for completion in found]}")
        if mode == "abort":
            assert "abort" in reasons and all(seen == [1] for seen in versions)  # one may have ended before
        else:
            assert "abort" not in reasons and all(seen in ([1, 2], [1]) for seen in versions) and [1, 2] in versions
        assert largest_difference(answers(io, server), after) < TOLERANCE  # the prompts are old prefixes
    finally:
        io.run(client.close())
        io.run(control.client.close())
        server.restore()


def test_a_server_that_is_gone_is_reported_and_the_other_goes_on(server, parallel, io, tmp_path):
    folder = sglang_models.make_dense(tmp_path / "m", seed=14)
    gone = Control(Client("http://127.0.0.1:9", "", vocab_size=512, context_length=2048))
    control = Control(server.client())
    told = []
    push = WeightPush(
        TensorTransport(iterate_hf_tensors, BUCKET_BYTES), io, [gone, control], "retract", tell=told.append
    )
    try:
        assert push(policy(folder), 7, [0, 1]) == [0]
        assert "server 0 did not take weights of version 7" in told[0] and len(told) == 1
        assert io.run(control.weight_version()) == "7"
        assert largest_difference(answers(io, server), folder) < TOLERANCE
    finally:
        for one in (gone, control):
            io.run(one.client.close())
        server.restore()


class Deaf(Control):
    """Drops one tensor on its way, as a server does with a name that it does not know."""

    async def update_weights_from_tensor(self, payloads, *, load_format=None):
        flat = pickle.loads(base64.b64decode(payloads[0]))
        flat["metadata"] = [place for place in flat["metadata"] if not place.name.endswith("1.mlp.up_proj.weight")]
        left = base64.b64encode(pickle.dumps(flat)).decode()
        await super().update_weights_from_tensor([left], load_format=load_format)


def test_a_tensor_that_did_not_arrive_is_noticed(server, parallel, io, tmp_path):
    before, after = (sglang_models.make_dense(tmp_path / f"m{seed}", seed=seed) for seed in (17, 18))
    told, control = [], Control(server.client())
    verify = Verifier(range(1, 17), iterate_hf_tensors, told.append)

    def push(control, folder, version):
        transport = TensorTransport(iterate_hf_tensors, BUCKET_BYTES)
        pushed = WeightPush(transport, io, [control], "retract", verify=verify, tell=told.append, examine=check_export)
        return pushed(policy(folder), version, [0])

    try:
        assert push(control, before, 1) == [] and told == []  # every tensor has the trainer's digest
        assert push(Deaf(control.client), after, 2) == [0]
        assert "and the trainer differ in 1 of" in told[0] and "0/model.layers.1.mlp.gate_up_proj.weight" in told[0]
        with pytest.raises(TimeoutError):  # still paused: nothing is sampled from a mixture
            io.run(asyncio.wait_for(control.client.generate("mixed", PROMPTS[0], SamplingParams(max_new_tokens=1)), 2))
    finally:
        io.run(control.client.close())
        server.restore()


def test_a_folder_that_is_not_there_leaves_the_weights_in_use(server, parallel, io, tmp_path):
    folder = sglang_models.make_dense(tmp_path / "m", seed=15)
    control = Control(server.client())
    tensors = WeightPush(TensorTransport(iterate_hf_tensors, BUCKET_BYTES), io, [control], "retract")
    lost = DiskTransport(lambda weights, to: None, tmp_path / "nowhere", True, flushes=True)
    try:
        assert tensors(policy(folder), 1, [0]) == []
        push = WeightPush(lost, io, [control], "retract")
        assert push(policy(folder), 2, [0]) == [0]
        io.run(control.continue_generation())
        assert io.run(control.weight_version()) == "1"
        assert largest_difference(answers(io, server), folder) < TOLERANCE
    finally:
        io.run(control.client.close())
        server.restore()


class OneRank:
    rank = 0

    def broadcast(self, thing):
        return thing


def test_a_server_that_refuses_half_way_is_started_again_and_given_all(server, parallel, tmp_path):
    """It has part of the new weights then, and answers nobody until it has all of them."""
    before, after = (sglang_models.make_dense(tmp_path / f"m{seed}", seed=seed) for seed in (19, 20))
    io, told, interrupts = IoThread(), [], []

    def export(weights):
        for place, pair in enumerate(iterate_hf_tensors(weights)):
            if place == 20 and interrupts:
                server.call(interrupts.pop(), {})
            yield pair

    async def restart(index):
        told.append("restart")
        await asyncio.to_thread(server.process.stop, at_once=True)
        server.process.start()
        await server.process.wait_ready(250)

    client, first_pid = server.client(), server.pid
    pool = Pool([client], 16, 60.0)

    def paused(is_paused):
        pool.is_paused = is_paused

    push = WeightPush(TensorTransport(export, BUCKET_BYTES), io, [Control(client)], "retract", paused, tell=told.append)
    engine = SGLangEngine(OneRank(), push, io, pool, restart)

    async def conversation():
        params = SamplingParams(max_new_tokens=300, temperature=1.0)
        return await asyncio.gather(*(engine.generate(ids, params) for ids in PROMPTS))

    try:
        engine.load(policy(before), 1)
        begun = engine.begin(conversation)
        time.sleep(1)  # requests are under way
        interrupts.append("/end_weight_update")  # so that the next bucket is refused
        engine.load(policy(after), 2)
        assert "did not take weights of version 2" in told[0] and "HTTP 400" in told[0] and told[1] == "restart"
        assert len(told) == 2 and server.pid != first_pid
        found = engine.finish(begun)
        # The restarted server has answered all of them, and from the second version alone.
        late = [completion for completion in found if set(completion.weight_versions) == {2}]
        assert late and largest_difference(late, after) < TOLERANCE
        assert all(set(completion.weight_versions) in ({1}, {2}) for completion in found)
    finally:
        engine.close()
        if not server.process.is_alive():
            server.process.start()
            asyncio.run(server.process.wait_ready(250))
        server.restore()
