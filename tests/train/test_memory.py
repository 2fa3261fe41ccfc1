"""Engine and trainer on the same accelerator take turns with its memory (train/memory.py, Trainer.sleep and wake)."""

import pytest
import torch
from builders import sample
from small_trainer import PLATFORM, TINY  # selects the platform, before Megatron is imported

from megatron_pz.batch.schedule import plan_update
from megatron_pz.config.schema import Config, ModelConfig, TrainConfig
from megatron_pz.platform.cpu import CpuPlatform
from megatron_pz.report.metrics import check
from megatron_pz.train.memory import SharedMemory
from megatron_pz.train.model import build_model
from megatron_pz.train.parallel import init_parallel, shutdown
from megatron_pz.train.step import Trainer


@pytest.fixture(scope="module")
def parallel():
    yield init_parallel(Config().parallel, PLATFORM, seed=1)
    shutdown()


def trained(parallel, rests):
    config = Config(model=ModelConfig(init="random"), train=TrainConfig(lr=1e-2, lr_decay_style="constant"))
    torch.manual_seed(5)
    trainer = Trainer(build_model(TINY, config, PLATFORM, parallel), config, PLATFORM, parallel)
    samples = [sample((5, 9, 20), (7, 1), advantage=1.0), sample((5, 9), (11, 3, 1), advantage=-0.5)]
    plan = plan_update(samples, max_tokens=64, dp_size=1, loss_aggregation="token_mean")
    for step in (1, 2, 3):
        if rests:
            trainer.sleep()
            assert all(buffer.grad_data.untyped_storage().size() == 0 for buffer in trainer.chunks[0].buffers)
            trainer.wake()
        trainer.step(plan, lr_step=step)
    return [parameter.detach().clone() for parameter in trainer.chunks[0].parameters()]


def test_a_trainer_that_slept_between_updates_learns_the_same_to_the_bit(parallel):
    for rested, awake in zip(trained(parallel, True), trained(parallel, False), strict=True):
        assert torch.equal(rested, awake)


def test_never_are_both_awake_and_each_phase_is_measured():
    awake, log = {"engine"}, []  # the trainer sleeps before servers start

    def moves(who, up):
        def move():
            (awake.add if up else awake.discard)(who)
            log.append(f"{who} {'wakes' if up else 'sleeps'}")
            assert len(awake) <= 1

        return move

    memory = SharedMemory(
        moves("engine", False), moves("engine", True), moves("trainer", False), moves("trainer", True), PLATFORM
    )
    for _ in range(2):
        memory.to_trainer()
        assert awake == {"trainer"}
        memory.to_engine()
        assert awake == {"engine"}
        metrics = memory.lap()
        check(metrics)
        assert len(metrics) == 2 and min(metrics.values()) > 0
        assert memory.lap() == {}
    turn = ["engine sleeps", "trainer wakes", "trainer sleeps", "engine wakes"]
    assert log == [*turn, *turn]


class Counted(CpuPlatform):
    """A device whose memory is a number that the test sets."""

    counts_phases = True

    def __init__(self):
        self.allocated = self.peak = self.kept = 0

    def memory_bytes(self):
        return {"allocated": self.allocated, "peak": self.peak}

    def begin_phase(self):
        self.peak = self.allocated

    def release_unused(self):
        self.kept = 0

    def take(self, allocated, peak):
        self.allocated, self.peak, self.kept = allocated, max(self.peak, peak), peak


def test_each_phase_has_its_own_peak_and_servers_wake_when_freed_memory_was_given_back():
    device, kept_at_waking = Counted(), []
    memory = SharedMemory(
        lambda: None,
        lambda: kept_at_waking.append(device.kept),
        lambda: device.take(10, 10),
        lambda: device.take(50, 50),
        device,
    )
    device.take(10, 20)  # play
    memory.to_trainer()
    device.take(50, 90)  # update
    memory.to_engine()
    device.take(10, 35)  # weights are handed over
    assert memory.lap() == {
        "memory/trainer_asleep_bytes": 10,
        "memory/trainer_awake_bytes": 50,
        "memory/peak_play_bytes": 20,
        "memory/peak_update_bytes": 90,
        "memory/peak_sync_bytes": 35,
    }
    assert kept_at_waking == [0] and device.kept == 0
