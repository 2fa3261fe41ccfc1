"""The tiny trainer of `small_trainer`, for the tests that ask for it."""

import pytest


@pytest.fixture(scope="module")
def parallel():
    from small_trainer import CONFIG, PLATFORM

    from megatron_pz.train.parallel import init_parallel, shutdown

    yield init_parallel(CONFIG.parallel, PLATFORM, seed=1)
    shutdown()


@pytest.fixture
def trainer(parallel):
    from small_trainer import new_trainer

    return new_trainer(parallel)
