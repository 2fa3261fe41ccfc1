"""A refused update on disk comes back as it was."""

import dataclasses

import numpy as np
import pytest
from builders import sample

from megatron_pz.batch.schedule import plan_update
from megatron_pz.config.load import to_toml
from megatron_pz.config.schema import Config
from megatron_pz.errors import CheckpointError, DiskError
from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported

import torch  # noqa: E402

from megatron_pz.train.dump import Dump, read_dump, write_dump  # noqa: E402
from megatron_pz.types import MicroBatch  # noqa: E402


def dump(**changes):
    routed = dataclasses.replace(sample(), routed_experts=np.arange(12, dtype=np.int16).reshape(3, 2, 2))
    plan = plan_update([routed, sample((1, 2, 3), (4,), advantage=-1.0)], max_tokens=4, dp_size=2)
    given = {
        "step": 12,
        "rank": 1,
        "world_size": 2,
        "error": "loss is nan",
        "settings": to_toml(Config()),
        "hf_config": {"model_type": "qwen3", "rope_scaling": None},
        "plan": plan,
        "old_log_probs": [np.array([-0.5, 0.0], np.float32)],
        "ref_log_probs": None,
        "weights": [{"a": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)}],
    }
    return Dump(**{**given, **changes})


def test_everything_comes_back(tmp_path):
    put = dump()
    path = write_dump(put, tmp_path / "dumps")
    assert path == tmp_path / "dumps" / "step_000012-rank1.pt" == Dump.path(tmp_path / "dumps", 12, 1)
    got = read_dump(path)
    for name in ("step", "rank", "world_size", "error", "settings", "hf_config", "ref_log_probs"):
        assert getattr(got, name) == getattr(put, name)
    assert (got.plan.num_tokens, got.plan.num_samples) == (put.plan.num_tokens, put.plan.num_samples)
    assert [len(batches) for batches in got.plan.micro_batches] == [len(batches) for batches in put.plan.micro_batches]
    for ours, theirs in zip(sum(got.plan.micro_batches, ()), sum(put.plan.micro_batches, ()), strict=True):
        for field in dataclasses.fields(MicroBatch):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            assert type(one) is type(other)
            np.testing.assert_array_equal(one, other)
            assert np.asarray(one).dtype == np.asarray(other).dtype
    np.testing.assert_array_equal(got.old_log_probs[0], put.old_log_probs[0])
    [weights] = got.weights
    assert weights["a"].dtype == torch.bfloat16 and torch.equal(weights["a"].isnan(), torch.tensor([False, True]))


def test_a_later_dump_of_the_same_step_takes_its_place(tmp_path):
    write_dump(dump(), tmp_path)
    write_dump(dump(error="loss is inf"), tmp_path)
    assert [read_dump(path).error for path in tmp_path.iterdir()] == ["loss is inf"]


def test_no_room_is_told_and_nothing_half_written_stays(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="step_000012-rank1.pt could not be written: .*File exists"):
        write_dump(dump(), tmp_path / "file")


def test_reading_a_dump_runs_nothing(tmp_path):
    class Mean:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    torch.save({"step": Mean()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="evil.pt is no dump of a refused update"):
        read_dump(tmp_path / "evil.pt")
    assert not (tmp_path / "was_run").exists()
    torch.save({"step": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other.pt is no dump .*\(KeyError"):
        read_dump(tmp_path / "other.pt")
