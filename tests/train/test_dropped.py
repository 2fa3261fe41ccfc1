"""A trainer that is dropped goes, and the threads of its process groups with it."""

import gc
import weakref

from small_trainer import PLATFORM, SAMPLES, new_trainer  # selects the platform, before Megatron is imported

from megatron_pz.batch.schedule import plan_update
from megatron_pz.config.schema import Config
from megatron_pz.train.parallel import init_parallel, shutdown


def test_nothing_keeps_model_and_optimizer_after_a_step():
    trainer = new_trainer(init_parallel(Config().parallel, PLATFORM, seed=1))
    trainer.step(plan_update(SAMPLES, max_tokens=64), lr_step=1)
    kept = [weakref.ref(each) for each in (trainer, trainer.optimizer, *trainer.chunks)]
    del trainer
    shutdown()
    gc.collect()
    assert [each() for each in kept] == [None] * 3
