"""Each rank is handed its own samples, and few bytes for them."""

import json
import pickle
from pathlib import Path

import numpy as np
from builders import sample
from programs import on_ranks

from megatron_pz.batch.schedule import hands, plan_update

WORKER = Path(__file__).parents[1] / "layouts" / "deal_worker.py"


def test_ranks_are_sent_their_own_samples_and_no_others(tmp_path):
    on_ranks(4, WORKER, tmp_path, timeout_s=240)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [one["update"][0]["dp_rank"] for one in found] == [0, 1, 0, 1]
    first, second = (set(one["update"][0]["samples"]) for one in found[:2])
    assert not first & second and len(first | second) == 8
    assert found[2]["update"] == found[0]["update"] and found[3]["update"] == found[1]["update"]
    own = found[0]["update"][0]["samples"]
    assert all(ids[:-1] == list(range(10000 * int(i), 10000 * int(i) + len(ids) - 1)) for i, ids in own.items())
    assert all(one["nothing"] == [] for one in found)
    # 10 408 tokens are shared out by halves: 12 bytes for each of a rank's own, and a few hundred a sample.
    tokens = max(sum(map(len, one["update"][0]["samples"].values())) for one in found)
    assert tokens < 5600
    assert all(12 * tokens < one["bytes"] < 12 * tokens + 4000 for one in found)


def test_a_hand_takes_twelve_bytes_a_token_of_its_own_samples():
    rng = np.random.default_rng(0)
    samples = [sample(rng.integers(0, 150000, 300).tolist(), rng.integers(0, 150000, 700).tolist()) for _ in range(32)]
    dealt = hands(samples, max_tokens=4096, dp_size=4)
    sizes = [len(pickle.dumps(hand, pickle.HIGHEST_PROTOCOL)) for hand in dealt]
    tokens = [sum(len(one.token_ids) for one in hand.samples.values()) for hand in dealt]
    assert sum(tokens) == 32000
    assert all(12 * n < size < 12.6 * n for size, n in zip(sizes, tokens, strict=True))


def test_what_a_rank_makes_of_its_hand_is_its_part_of_the_plan():
    samples = [sample(range(10 * i, 10 * i + 3), range(i + 1), weight=0.5 + i) for i in range(7)]
    settings = {"max_tokens": 12, "dp_size": 3, "loss_aggregation": "sequence_mean"}
    whole = plan_update(samples, **settings, align=4)
    for rank, hand in enumerate(hands(samples, **settings)):
        sent = pickle.loads(pickle.dumps(hand)).plan(align=4)
        assert [len(batches) > 0 for batches in sent.micro_batches] == [other == rank for other in range(3)]
        assert (sent.num_tokens, sent.num_samples) == (whole.num_tokens, 7)
        for one, other in zip(sent.micro_batches[rank], whole.micro_batches[rank], strict=True):
            assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in one.__slots__[:-1])
