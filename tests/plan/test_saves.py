"""What a run wants of the disk, by hand: checkpoints of 14 bytes, folders of weights of 2."""

import pytest

from megatron_pz.config.schema import CheckpointConfig, Config, EngineConfig, SGLangConfig, TrainConfig
from megatron_pz.plan.saves import Room, Saves, room

SAVED = Saves(checkpoint_bytes=14, weights_bytes=2, num_on_disk=3, host_bytes=0)


def wanted(there=(), *, last=40, interval=10, keep=2, export=True, transport="", engine="sglang"):
    config = Config(
        train=TrainConfig(train_iters=last),
        checkpoint=CheckpointConfig(save_interval=interval, keep=keep, export_hf=export),
        engine=EngineConfig(engine=engine if transport else "embedded"),
        sglang=SGLangConfig(weight_transport=transport or "tensor"),
    )
    return room(SAVED, config, there)


@pytest.mark.parametrize(
    ("found", "there", "settings"),
    [
        (Room(3, 0, 42), (), {}),  # the third is whole before the first goes; then there is room for hf/
        (Room(2, 1, 30), (), {"keep": 4, "interval": 20}),  # nothing goes before hf/ comes
        (Room(2, 0, 28), (), {"keep": 4, "interval": 20, "export": False}),
        (Room(2, 1, 30), (), {"keep": 4, "interval": 30}),  # at 30 and at the end
        (Room(1, 1, 16), (), {"interval": 0}),
        (Room(1, 0, 14), (10, 20), {}),  # the place of one that goes serves hf/
        (Room(1, 0, 14), (10, 20, 30), {}),  # --keep was larger before
        (Room(1, 1, 16), (10,), {"last": 20}),
        (Room(0, 1, 2), (30, 40), {}),  # the run is done and only exports again
        (Room(3, 3, 48), (), {"transport": "disk"}),
        (Room(3, 0, 42), (), {"transport": "disk", "engine": "embedded"}),
        (Room(1, 4, 22), (), {"transport": "disk", "interval": 0}),
    ],
)
def test_the_fuller_of_two_moments(found, there, settings):
    assert wanted(there, **settings) == found
