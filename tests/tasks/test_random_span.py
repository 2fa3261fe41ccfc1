"""The random-span baseline and its format-only control: the prediction game without a generator."""

import asyncio
import dataclasses
import random

from builders import PLAIN, ByteTokenizer, TableEngine

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.game.masking import MaskRules
from megatron_pz.game.spans import reject_reason
from megatron_pz.tasks.random_span import RandomSpan
from megatron_pz.types import Paragraph, Role

TASK = TaskConfig(task="random_span", n_masks_per_paragraph=3, n_predictions_per_mask=4, max_prompt_tokens=90)
PARAGRAPHS = [
    Paragraph("leads:1", "Paris is the capital of France and lies on the Seine."),
    Paragraph("leads:2", "The Seine flows through Paris, then past Rouen."),
    Paragraph("none", "... --- ..."),
]


def _play(seed=(1, 1), order=None, reply=lambda prompt, params: r"\boxed{Paris}", task=TASK):
    game = RandomSpan(task, EngineConfig(max_response_tokens=40), ByteTokenizer(), PLAIN)
    engine = TableEngine(reply, order=order)
    return game, asyncio.run(game.play(PARAGRAPHS, engine, seed))


def test_all_rollouts_are_predictions_of_valid_random_masks():
    _, rollouts = _play()
    texts = {p.id: p.text for p in PARAGRAPHS}
    assert len(rollouts) == 2 * 3 * 4  # the third paragraph has no word to hide
    for rollout in rollouts:
        assert rollout.role is Role.PREDICTOR and rollout.paragraph_id != "none"
        assert reject_reason(rollout.target, texts[rollout.paragraph_id], MaskRules()) is None
        assert rollout.prompt == "<pred>" + rollout.mask.masked_text
    assert [r.group_id for r in rollouts[::4]] == ["1.0.0", "1.0.1", "1.0.2", "1.1.0", "1.1.1", "1.1.2"]


def test_predictions_of_one_mask_share_prompt_and_baseline():
    game, rollouts = _play(reply=lambda p, params: rf"\boxed{{ {random.Random(params.seed).choice(['Paris', 'the'])}}}")
    groups = game.groups(rollouts, step=2)
    assert [len({r.prompt for r in g.rollouts}) for g in groups] == [1] * 6
    assert game.health(groups)["reward/prediction/mean"] == sum(r.reward for r in rollouts) / 24


def test_the_masks_follow_the_seed_and_not_the_landing():
    _, first = _play((1, 1))
    assert _play((1, 1), order=random.Random(3))[1] == first
    assert [r.target for r in _play((1, 2))[1]] != [r.target for r in first]
    assert [r.target for r in _play((2, 1))[1]] != [r.target for r in first]


def test_format_only_asks_the_same_and_pays_whatever_can_be_read():
    replies = [r"\boxed{Paris}", r"\boxed{no such word}", r"\boxed{}", "Paris"]

    def reply(prompt, params):
        return replies[params.seed % 4]

    control = dataclasses.replace(TASK, task="format_only", n_predictions_per_mask=16)
    game, paid = _play(reply=reply, task=control)
    _, judged = _play(reply=reply, task=dataclasses.replace(control, task="random_span"))
    assert [(r.prompt, r.response, r.target) for r in paid] == [(r.prompt, r.response, r.target) for r in judged]
    assert {(r.response, r.reward) for r in paid} == dict(zip(replies, (1.0, 1.0, 0.0, 0.0), strict=True)).items()
    assert any(p.reward != j.reward for p, j in zip(paid, judged, strict=True))
    groups = game.groups(paid, 1)
    assert all(group.trained for group in groups)  # each has answers and none
    for group in groups:
        assert len({(r.reward, a) for r, a in zip(group.rollouts, group.advantages, strict=True)}) == 2


def test_format_only_pays_no_answer_that_was_cut_off():
    _, rollouts = _play(
        reply=lambda p, params: r"\boxed{Paris}" + " and" * 20, task=dataclasses.replace(TASK, task="format_only")
    )
    assert {(r.reject_reason, r.answer, r.reward) for r in rollouts} == {("truncated", "Paris", 0.0)}


def test_there_is_no_metric_of_a_role_that_does_not_play():
    game, rollouts = _play()
    health = game.health(game.groups(rollouts, 1))
    assert not [name for name in health if name.startswith(("mask/reject", "mask/valid", "reward/mask"))]
    assert health["mask/length_words"] >= 1 and health["prediction/format_rate"] == 1
