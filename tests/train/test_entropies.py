"""Entropies of a paragraph's tokens under the trainer's weights."""

import numpy as np
import pytest
from builders import ByteTokenizer

from megatron_pz.config.schema import Config, ModelConfig, TrainConfig
from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")  # before Megatron is imported

import torch  # noqa: E402
from hf_models import MODELS, SMALL  # noqa: E402

from megatron_pz.models.shards import unwrap  # noqa: E402
from megatron_pz.train.entropies import with_entropies  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402
from megatron_pz.types import Paragraph  # noqa: E402

TEXTS = [Paragraph("a", "Paris is big."), Paragraph("b", "x"), Paragraph("c", "Rouen, on the Seine.")]
CONFIG = SMALL | MODELS["qwen3"].fields | {"model_type": "qwen3", "vocab_size": 258, "rope_theta": 1e4}


@pytest.fixture(scope="module")
def trainer():
    config = Config(model=ModelConfig(init="random"), train=TrainConfig(max_tokens_per_micro_batch=16))
    parallel = init_parallel(config.parallel, PLATFORM, seed=1)
    yield Trainer(build_model(CONFIG, config, PLATFORM, parallel), config, PLATFORM, parallel)
    shutdown()


@pytest.mark.parametrize("bos", [(), (7,)])
def test_each_token_has_the_entropy_of_what_comes_after_the_text_before_it(trainer, bos):
    """Largest difference seen: 1e-6 nats."""
    tokenizer = ByteTokenizer(bos)
    studied = with_entropies(TEXTS, tokenizer, trainer, trainer.config)
    assert [(p.id, p.text) for p in studied] == [(p.id, p.text) for p in TEXTS]
    model = unwrap(trainer.chunks[0])
    for paragraph in studied:
        ids = [*bos, *tokenizer.encode(paragraph.text)]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), torch.arange(len(ids))[None]).reshape(len(ids), -1)[:, :258].double()
        p = torch.softmax(logits, -1)
        after = -(p * p.log()).sum(-1).numpy()
        wanted = [0.0, *after[:-1]][len(bos) :]
        np.testing.assert_allclose(paragraph.token_entropies, wanted, atol=1e-5)
        assert len(set(paragraph.token_entropies)) == len(paragraph.token_entropies)  # this policy tells them apart
