"""The settings' `task` names the task."""

import typing

import pytest
from builders import PLAIN, ByteTokenizer

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.tasks.next_token import NextToken
from megatron_pz.tasks.pretrain_zero import PretrainZero
from megatron_pz.tasks.random_span import RandomSpan
from megatron_pz.tasks.registry import make_task
from megatron_pz.tasks.rlvr import Rlvr
from megatron_pz.tasks.supervised import ContinuePretraining, SupervisedFormats

TASKS = {
    "pretrain_zero": PretrainZero,
    "random_span": RandomSpan,
    "format_only": RandomSpan,
    "random_ntp": NextToken,
    "entropy_ntp": NextToken,
    "continue_pt": ContinuePretraining,
    "sft": SupervisedFormats,
    "rlvr": Rlvr,
}


@pytest.mark.parametrize("name", TASKS)
def test_each_name_makes_its_task(name):
    assert type(make_task(TaskConfig(task=name), EngineConfig(), ByteTokenizer(), PLAIN)) is TASKS[name]


def test_every_task_of_the_settings_is_made():
    assert set(typing.get_args(typing.get_type_hints(TaskConfig)["task"])) == set(TASKS)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("pretrain_zero", "<gen>ab"),
        ("random_span", "<pred>ab"),
        ("format_only", "<pred>ab"),
        ("random_ntp", "<pred>ab"),
        ("sft", "<gen>ab"),
        ("continue_pt", ""),
    ],
)
def test_the_first_prompt_about_a_text_can_be_measured(name, prompt):
    task = make_task(TaskConfig(task=name), EngineConfig(), ByteTokenizer(), PLAIN)
    assert list(task.prompt_ids("ab")) == list(prompt.encode())
