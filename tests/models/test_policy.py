"""The policy against `transformers`, its log-probabilities against its logits, and decoding against the whole forward."""

import hf_models
import pytest
import torch
import torch.nn.functional as F

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.config.schema import Config, ModelConfig, TrainConfig  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.models.policy import build_policy  # noqa: E402
from megatron_pz.models.shards import shards_of  # noqa: E402

TOLERANCE = 1e-4  # of logits with standard deviation 1.5; 6e-6 is seen
ROW = torch.cat(hf_models.sequences())
POSITIONS = torch.cat([torch.arange(length) for length in hf_models.LENGTHS])
BOUNDS = torch.tensor([0, *hf_models.LENGTHS]).cumsum(0)


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def loaded(folder):
    """(policy, expected logits) of a model by name."""
    made = {}

    def get(name):
        if name not in made:
            config = Config(train=TrainConfig(log_prob_chunk_tokens=5))
            model = build_policy(read_hf_config(folder(name)), config, PLATFORM).eval()
            load_hf_weights([model], folder(name))
            made[name] = (model, hf_models.expected_logits(folder(name)))
        return made[name]

    return get


def packed(model, **kwargs):
    params = PLATFORM.packed_seq_params(BOUNDS)
    return model(ROW[None], POSITIONS[None], packed_seq_params=params, **kwargs)


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_packed_sequences_have_the_logits_that_transformers_gives_each_alone(loaded, name):
    model, expected = loaded(name)
    with torch.no_grad():
        found = packed(model)
    assert found.shape == (1, len(ROW), hf_models.VOCAB_SIZE)
    assert (found[0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_a_single_sequence_needs_no_packing(loaded, name):
    model, expected = loaded(name)
    ids = hf_models.sequences()[0]
    with torch.no_grad():
        found = model(ids[None], torch.arange(len(ids))[None])
    assert (found[0] - expected[: len(ids)]).abs().max() < TOLERANCE


def test_no_token_sees_another_sequence_of_its_row(loaded):
    model, _ = loaded("qwen3")
    other = ROW.clone()
    other[: hf_models.LENGTHS[0]] = 5
    params = PLATFORM.packed_seq_params(BOUNDS)
    with torch.no_grad():
        before = packed(model)[0]
        after = model(other[None], POSITIONS[None], packed_seq_params=params)[0]
    assert torch.equal(before[hf_models.LENGTHS[0] :], after[hf_models.LENGTHS[0] :])
    assert not torch.equal(before[: hf_models.LENGTHS[0]], after[: hf_models.LENGTHS[0]])


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_labels_give_log_probs_and_entropies_of_the_logits_with_their_gradient(loaded, name, temperature):
    model, _ = loaded(name)
    labels = ROW.flip(0)
    parameter = model.decoder.layers[0].self_attention.linear_qkv.weight

    model.zero_grad()
    log_probs, entropy = packed(model, labels=labels[None], temperature=temperature)
    (2 * log_probs.sum()).backward()
    found = parameter.grad.clone()

    model.zero_grad()
    reference = (packed(model)[0] / temperature).log_softmax(-1)
    (2 * reference.gather(1, labels[:, None]).sum()).backward()
    assert torch.allclose(log_probs, reference.gather(1, labels[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(entropy, -(reference.exp() * reference).sum(-1), atol=1e-5)
    assert (found - parameter.grad).norm() < 1e-5 * parameter.grad.norm()
    model.zero_grad()


def test_logits_of_wanted_positions_are_those_of_all(loaded):
    model, _ = loaded("qwen3_moe")
    wanted = torch.tensor([16, 0, 10])
    with torch.no_grad():
        assert torch.allclose(packed(model, logits_at=wanted)[0], packed(model)[0][wanted], atol=1e-6)


class RowCache:
    """Keys and values of several rows in lists: the plainest object that `decoding` accepts."""

    def __init__(self, num_layers: int, num_rows: int):
        self.kept = [[None] * num_rows for _ in range(num_layers)]
        self.rows: list[int] = []  # of each new token

    def attend(self, layer_index, query, key, value):
        outputs = []
        for token, row in enumerate(self.rows):
            new = [x[token].transpose(0, 1) for x in (key, value)]  # [heads, b=1, dim], tokens in the middle
            old = self.kept[layer_index][row]
            kept = new if old is None else [torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)]
            self.kept[layer_index][row] = kept
            seen = F.scaled_dot_product_attention(query[token].transpose(0, 1), *kept, enable_gqa=True)
            outputs.append(seen.transpose(0, 1).flatten(1))
        return torch.stack(outputs)


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "qwen3_moe mixed", "llama"])
def test_rows_at_different_positions_decode_to_the_logits_of_the_whole_forward(loaded, name):
    model, expected = loaded(name)
    starts = BOUNDS[:-1].tolist()
    cache = RowCache(len(model.decoder.layers), len(starts))
    # Row 0 runs ahead; row 1 joins at step 3 and row 2 at step 5, so that positions differ within a step.
    begins = [0, 3, 5]
    with torch.no_grad():
        for step in range(max(hf_models.LENGTHS)):
            places = [(row, step - begin) for row, begin in enumerate(begins)]
            live = [(row, at) for row, at in places if 0 <= at < hf_models.LENGTHS[row]]
            cache.rows = [row for row, _ in live]
            at = torch.tensor([starts[row] + place for row, place in live])
            positions = torch.tensor([place for _, place in live])
            with model.decoding(cache, positions):
                found = model(ROW[at][None], positions[None])[0]
            assert (found - expected[at]).abs().max() < TOLERANCE


def test_decoding_leaves_the_model_as_it_was_even_after_an_error(loaded):
    model, expected = loaded("qwen3")
    with pytest.raises(ZeroDivisionError), model.decoding(RowCache(2, 1), torch.tensor([3])):
        raise ZeroDivisionError
    with torch.no_grad():
        assert (packed(model)[0] - expected).abs().max() < TOLERANCE


def test_random_weights_are_a_function_of_the_seed_with_megatrons_spread():
    hf = hf_models.SMALL | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False}

    def built(seed):
        config = Config(model=ModelConfig(init="random"), train=TrainConfig(seed=seed))
        torch.manual_seed(seed + 100)  # the global state must not matter
        model = build_policy(hf, config, PLATFORM)
        return {shard.hf_names[0]: shard.parameter.detach() for shard in shards_of([model])}

    first, second, other = built(1), built(1), built(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["model.layers.0.self_attn.q_proj.weight"].std() == pytest.approx(0.2, rel=0.05)
    # Matrices that write into the residual stream: 0.2 / sqrt(2 * 2 layers).
    assert first["model.layers.1.mlp.down_proj.weight"].std() == pytest.approx(0.1, rel=0.05)
    assert (first["model.norm.weight"] == 1).all()
    assert not first["lm_head.weight"][hf_models.VOCAB_SIZE :].any()
