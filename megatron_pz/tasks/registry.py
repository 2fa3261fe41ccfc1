"""The task that the settings name."""

from __future__ import annotations

from megatron_pz.config.schema import EngineConfig, TaskConfig, VerifierConfig
from megatron_pz.game.prompts import Templates
from megatron_pz.tasks.base import Task, TextTask
from megatron_pz.tasks.pretrain_zero import PretrainZero
from megatron_pz.tasks.random_span import RandomSpan
from megatron_pz.tasks.rlvr import Rlvr
from megatron_pz.tasks.supervised import ContinuePretraining, SupervisedFormats
from megatron_pz.types import Tokenizer


def make_task(
    task: TaskConfig,
    engine: EngineConfig,
    tokenizer: Tokenizer,
    templates: Templates,
    verifier: VerifierConfig | None = None,
) -> Task | TextTask:
    """A task ready to play, or to hand out text.

    Args:
        verifier: of `rlvr`; None: as the settings begin.

    Raises:
        TokenizerError: the prompts are chat turns and the tokenizer has no chat template.
        ConfigError: a prompt leaves no room for text.
    """
    match task.task:
        case "pretrain_zero":
            return PretrainZero(task, engine, tokenizer, templates)
        case "random_span":
            return RandomSpan(task, engine, tokenizer, templates)
        case "rlvr":
            return Rlvr(task, engine, tokenizer, templates, verifier or VerifierConfig())
        case "sft":
            return SupervisedFormats(task, engine, tokenizer, templates)
        case "continue_pt":
            return ContinuePretraining(tokenizer)
