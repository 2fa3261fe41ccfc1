"""Small models of `transformers` in folders, and one process for the tests that build policies of them."""

import hf_models
import pytest


@pytest.fixture(scope="module")
def alone():
    """Megatron's groups of one rank."""
    from megatron_pz.config.schema import Config
    from megatron_pz.platform.select import select_platform
    from megatron_pz.train.parallel import init_parallel, shutdown

    init_parallel(Config().parallel, select_platform("cpu"), seed=1)
    yield
    shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a model by its name, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / "model"
            hf_models.make(name, made[name])
        return made[name]

    return get
