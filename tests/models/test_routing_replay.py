"""Routing replay: `transformers` stands for the server, its router's choice is read, or another one is forced on it."""

from contextlib import contextmanager

import hf_models
import numpy as np
import pytest
import torch

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")  # before Megatron is imported

from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.config.schema import Config, ModelConfig, TrainConfig  # noqa: E402
from megatron_pz.errors import ConfigError, EngineError  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.models.policy import build_policy  # noqa: E402
from megatron_pz.models.routing_replay import UNKNOWN  # noqa: E402


def bounds_of(sequences):
    return torch.tensor([0, *map(len, sequences)]).cumsum(0)


MODELS = ["qwen3_moe", "qwen3_moe mixed"]  # the second has a dense layer, and probabilities that do not add up to 1
EXPERTS, TOPK, LAYERS = 8, 3, 2
SEQUENCES = hf_models.sequences()
ROW = torch.cat(SEQUENCES)
BOUNDS = bounds_of(SEQUENCES)


pytestmark = pytest.mark.usefixtures("alone")


def policy(folder, *, replay=True, dtype="float32", **transformer):
    config = Config(
        model=ModelConfig(params_dtype=dtype), train=TrainConfig(routing_replay=replay), transformer=transformer
    )
    model = build_policy(read_hf_config(folder), config, PLATFORM)
    load_hf_weights([model], folder)
    return model.train()


class Server:
    """The model in `transformers`, sequence by sequence; experts are [T, LAYERS, TOPK]."""

    def __init__(self, folder, dtype=torch.float32):
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)

    def log_probs(self, forced=None, sequences=SEQUENCES):
        """(log-probs float32 [T] of `labels_of`, experts that were taken; 0 in dense layers)."""
        labels = labels_of(sequences)
        asked = np.zeros((len(labels), LAYERS, TOPK), np.int16)
        rows = []
        for start, ids in zip(bounds_of(sequences).tolist(), sequences, strict=False):
            here = slice(start, start + len(ids))
            with self._routers(asked[here], None if forced is None else forced[here]), torch.no_grad():
                rows.append(self.model(ids[None]).logits[0].float().log_softmax(-1))
        return torch.cat(rows).gather(1, labels[:, None])[:, 0], asked

    @contextmanager
    def _routers(self, asked, forced):
        def hook(layer):
            def replace(router, inputs, output):
                logits, _, indices = output
                if forced is not None:
                    indices = torch.as_tensor(forced[:, layer].astype(np.int64))
                asked[:, layer] = indices.numpy()
                scores = logits.float().softmax(-1).gather(1, indices)
                if router.norm_topk_prob:
                    scores = scores / scores.sum(-1, keepdim=True)
                return logits, scores.to(logits.dtype), indices

            return replace

        layers = enumerate(self.model.model.layers)
        hooks = [layer.mlp.gate.register_forward_hook(hook(n)) for n, layer in layers if hasattr(layer.mlp, "gate")]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def labels_of(sequences):
    """Any tokens."""
    return torch.cat(sequences).flip(0)


def answer(model, experts=None, sequences=SEQUENCES):
    """Log-probs and entropies [2, T] of the packed row."""
    ids, positions = torch.cat(sequences), torch.cat([torch.arange(len(ids)) for ids in sequences])
    given = None if experts is None else torch.as_tensor(model.routing_replay.of_stage(experts))
    params = PLATFORM.packed_seq_params(bounds_of(sequences))
    labels = labels_of(sequences)[None]
    return model(ids[None], positions[None], packed_seq_params=params, labels=labels, routed_experts=given)


def foreign(seed=0):
    """Experts drawn by lot."""
    rng = np.random.default_rng(seed)
    draws = [[rng.permutation(EXPERTS)[:TOPK] for _ in range(LAYERS)] for _ in range(len(ROW))]
    return np.array(draws, np.int16)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_s_own_routing_replayed_changes_no_bit_of_log_probs_and_gradients(folder, name):
    plain, replaying = policy(folder(name), replay=False), policy(folder(name))
    _, own = Server(folder(name)).log_probs()
    outputs = answer(plain), answer(replaying, own), answer(replaying)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    for output in outputs[:2]:
        output[0].sum().backward()
    grads = [{n: p.grad for n, p in model.named_parameters()} for model in (plain, replaying)]
    assert all(torch.equal(grad, grads[1][n]) for n, grad in grads[0].items())


@pytest.mark.parametrize("name", MODELS)
def test_a_foreign_routing_gives_what_transformers_gives_with_it_forced(folder, name):
    model, server = policy(folder(name)), Server(folder(name))
    free, _ = server.log_probs()
    expected, taken = server.log_probs(foreign())
    found = answer(model, foreign())[0]
    assert (taken == foreign())[:, -1].all()
    assert (expected - free).abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-5


def test_a_token_without_experts_goes_where_the_router_sends_it(folder):
    model, server = policy(folder("qwen3_moe")), Server(folder("qwen3_moe"))
    _, own = server.log_probs()
    partly = foreign()
    partly[[3, 10, 16, 17]] = UNKNOWN  # ends of sequences, and one in the middle
    # What the router chooses itself depends on the experts of the tokens before: found by asking a plain model, layer by layer.
    mixed = foreign()
    for layer in range(LAYERS):
        mixed[:, layer][(partly == UNKNOWN).all((1, 2))] = chosen_in(server, mixed, layer)
    expected, _ = server.log_probs(mixed)
    assert (answer(model, partly)[0] - expected).abs().max() < 1e-5
    assert torch.equal(answer(model, np.full_like(own, UNKNOWN)), answer(model))


def chosen_in(server, forced, layer):
    """What the router of `layer` chooses for tokens 3, 10, 16, 17 where all before went as forced."""
    found = np.zeros((len(ROW), TOPK), np.int16)
    for start, ids in zip(BOUNDS.tolist(), SEQUENCES, strict=False):
        here = slice(start, start + len(ids))

        def keep(router, inputs, output, here=here):
            found[here] = output[0].topk(TOPK, -1).indices.numpy()

        with server._routers(np.zeros_like(forced[here]), forced[here]), torch.no_grad():
            handle = server.model.model.layers[layer].mlp.gate.register_forward_hook(keep)
            server.model(ids[None])
            handle.remove()
    return found[[3, 10, 16, 17]]


def gradients(model, *experts):
    """Of the sum of log-probs, all forwards before all backwards, as between pipeline stages."""
    outputs = [answer(model, given) for given in experts]
    for output in outputs:
        output[0].sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_flow_through_the_scores_of_the_experts_that_were_given(folder):
    model = policy(folder("qwen3_moe"))
    grads = gradients(model, foreign())
    router = model.decoder.layers[0].mlp.router.weight
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    direction = torch.zeros_like(router)
    direction[4] = grads["decoder.layers.0.mlp.router.weight"][4].sign()
    with torch.no_grad():
        values = []
        for step in (1e-3, -1e-3):
            router += step * direction
            values.append(answer(model, foreign())[0].double().sum().item())
            router -= step * direction
    slope = (grads["decoder.layers.0.mlp.router.weight"] * direction).sum().item()
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


RECOMPUTED = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "one layer in full": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "experts": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


@pytest.mark.parametrize("how", RECOMPUTED)
def test_what_is_recomputed_in_the_backward_goes_to_the_experts_of_its_own_forward(folder, how):
    given = (foreign(1), foreign(2), foreign(3))
    kept, recomputing = policy(folder("qwen3_moe")), policy(folder("qwen3_moe"), **RECOMPUTED[how])
    with torch.no_grad():
        answer(recomputing, foreign(4))  # a score, whose choice must not wait for a backward
    expected, found = gradients(kept, *given), gradients(recomputing, *given)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)


def test_what_was_forgotten_is_not_taken_for_a_later_backward(folder):
    model = policy(folder("qwen3_moe"), **RECOMPUTED["full"])
    answer(model, foreign(1))  # and no backward
    model.routing_replay.forget()
    expected = gradients(policy(folder("qwen3_moe")), foreign(2))
    found = gradients(model, foreign(2))
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)


def test_against_a_server_in_bfloat16_the_gap_is_smaller_with_its_routing(folder):
    model = policy(folder("qwen3_moe")).eval()
    sequences = [torch.randint(0, hf_models.VOCAB_SIZE, (48,), generator=torch.manual_seed(n)) for n in range(8)]
    rounded, taken = Server(folder("qwen3_moe"), torch.bfloat16).log_probs(sequences=sequences)
    with torch.no_grad():
        free = (answer(model, None, sequences)[0] - rounded).abs()
        replayed = (answer(model, taken, sequences)[0] - rounded).abs()
    print(f"gap {free.max():.3f}, mean {free.mean():.4f}; replayed {replayed.max():.3f}, mean {replayed.mean():.4f}")
    assert replayed.max() <= free.max()
    assert replayed.mean() < free.mean()


def test_without_replay_nothing_stands_in_the_routers(folder):
    model = policy(folder("qwen3_moe"), replay=False)
    assert model.routing_replay is None
    assert all(layer.mlp.router.router_replay is None for layer in model.decoder.layers)
    with pytest.raises(AssertionError, match="without routing_replay"):
        model(ROW[None], ROW[None], routed_experts=torch.zeros(len(ROW), LAYERS, TOPK))


def test_experts_of_dense_layers_are_not_looked_at(folder):
    replay = policy(folder("qwen3_moe mixed")).routing_replay
    given = foreign()
    given[:, 0] = 99
    assert replay.places == [1]
    assert np.array_equal(replay.of_stage(given), given[:, 1:])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((0, 0, 1), r"experts \[0, 0, 1\] for a token in layer 1; .* 3 different ones of 0 to 7"),
        ((0, 1, 8), r"experts \[0, 1, 8\] .* of 0 to 7"),
        ((0, 1, -1), r"experts \[0, 1, -1\]"),
    ],
)
def test_experts_that_there_cannot_be_are_told(folder, wrong, said):
    given = foreign()
    given[4, 1] = wrong
    with pytest.raises(EngineError, match=said):
        policy(folder("qwen3_moe")).routing_replay.of_stage(given)


def test_experts_of_another_model_are_told(folder):
    replay = policy(folder("qwen3_moe")).routing_replay
    with pytest.raises(EngineError, match=r"2 experts a token in 5 layers; the trainer's model has 3 in 2"):
        replay.of_stage(np.zeros((7, 5, 2), np.int16))


def test_a_model_or_router_that_cannot_replay_is_refused(folder):
    with pytest.raises(ConfigError, match="routing_replay is true, but the model has no experts"):
        policy(folder("qwen3"))
    with pytest.raises(ConfigError, match="moe_router_fusion or the load balancing 'sinkhorn'"):
        policy(folder("qwen3_moe"), moe_router_load_balancing_type="sinkhorn")
    with pytest.raises(ConfigError, match=r"transformer\.moe_enable_routing_replay is set by \[train\]"):
        policy(folder("qwen3_moe"), moe_enable_routing_replay=True)
