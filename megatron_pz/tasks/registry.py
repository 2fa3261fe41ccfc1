"""The task that the settings name."""

from __future__ import annotations

import dataclasses

from megatron_pz.config.schema import EngineConfig, TaskConfig, VerifierConfig
from megatron_pz.game.prompts import Templates
from megatron_pz.tasks.base import Task, TextTask
from megatron_pz.tasks.next_token import NextToken
from megatron_pz.tasks.pretrain_zero import PretrainZero
from megatron_pz.tasks.random_span import RandomSpan
from megatron_pz.tasks.rlvr import Rlvr
from megatron_pz.tasks.schedule import Scheduled
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
    if task.warm_up_task:
        alone = dataclasses.replace(task, warm_up_task="", warm_up_task_steps=0)
        first = make_task(dataclasses.replace(alone, task=task.warm_up_task), engine, tokenizer, templates)
        then = make_task(alone, engine, tokenizer, templates)
        assert isinstance(first, Task) and isinstance(then, Task), "config.rules lets only games follow each other"
        return Scheduled(first, task.warm_up_task_steps, then)
    match task.task:
        case "pretrain_zero":
            return PretrainZero(task, engine, tokenizer, templates)
        case "random_span" | "format_only":
            return RandomSpan(task, engine, tokenizer, templates)
        case "random_ntp" | "entropy_ntp":
            return NextToken(task, engine, tokenizer, templates)
        case "rlvr":
            return Rlvr(task, engine, tokenizer, templates, verifier or VerifierConfig())
        case "sft":
            return SupervisedFormats(task, engine, tokenizer, templates)
        case "continue_pt":
            return ContinuePretraining(tokenizer)
