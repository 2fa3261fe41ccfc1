"""A game that comes before another."""

import asyncio

from builders import PLAIN, ByteTokenizer, TableEngine

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.tasks.base import Task
from megatron_pz.tasks.registry import make_task
from megatron_pz.types import Paragraph, Role

TASK = TaskConfig(
    warm_up_task="random_span",
    warm_up_task_steps=2,
    n_masks_per_paragraph=2,
    n_predictions_per_mask=2,
    max_prompt_tokens=90,
)
PARAGRAPHS = [Paragraph("leads:1", "Paris is the capital of France.")]


def roles(task, step):
    engine = TableEngine(lambda prompt, _: r"\mask{Paris}" if prompt.startswith("<gen>") else r"\boxed{Paris}")
    whole = asyncio.run(task.play(PARAGRAPHS, engine, (1, step)))
    assert whole == asyncio.run(task.play_paragraph(PARAGRAPHS[0], 0, engine, (1, step)))
    return {rollout.role for rollout in whole}


def test_the_first_game_is_played_for_its_steps_and_then_the_other():
    task = make_task(TASK, EngineConfig(max_response_tokens=40), ByteTokenizer(), PLAIN)
    assert isinstance(task, Task)
    assert [len(roles(task, step)) for step in (1, 2, 3, 9)] == [1, 1, 2, 2]
    assert roles(task, 2) == {Role.PREDICTOR}


def test_a_paragraph_must_fit_the_longer_prompt():
    task = make_task(TASK, EngineConfig(), ByteTokenizer(), PLAIN)
    assert bytes(task.prompt_ids("ab")) == b"<pred>ab"  # of "<gen>ab" and "<pred>ab"
