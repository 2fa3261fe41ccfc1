"""A trainer on a tiny model in one process, for the tests of a step."""

import pytest


@pytest.fixture(scope="module")
def parallel():
    """Megatron's groups of one rank."""
    from small_trainer import PLATFORM  # selects the platform: only where a test asks for it

    from megatron_pz.config.schema import Config
    from megatron_pz.train.parallel import init_parallel, shutdown

    yield init_parallel(Config().parallel, PLATFORM, seed=1)
    shutdown()


@pytest.fixture
def trainer(parallel):
    """Makes a trainer; fields of `[train]` by name, others by section."""
    from small_trainer import PLATFORM, TINY

    from megatron_pz.config.schema import Config, EngineConfig, ModelConfig, TaskConfig, TrainConfig
    from megatron_pz.train.model import build_model
    from megatron_pz.train.step import Trainer

    def make(model=None, task="pretrain_zero", temperature=1.0, hf_config=TINY, **train):
        config = Config(
            model=model or ModelConfig(init="random"),
            task=TaskConfig(task=task),
            engine=EngineConfig(temperature=temperature),
            train=TrainConfig(**{"lr": 1e-2, "lr_decay_style": "constant", **train}),
        )
        return Trainer(build_model(hf_config, config, PLATFORM, parallel), config, PLATFORM, parallel)

    return make
