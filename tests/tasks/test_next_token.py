"""Next-token reasoning: random tokens, and those that the policy is least sure of."""

import asyncio
import dataclasses
import random

import pytest
from builders import PLAIN, ByteTokenizer, TableEngine

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.errors import ConfigError
from megatron_pz.tasks.next_token import NextToken
from megatron_pz.types import Paragraph, Role

TASK = TaskConfig(task="random_ntp", n_masks_per_paragraph=3, n_predictions_per_mask=2, max_prompt_tokens=90)
PARAGRAPHS = [Paragraph("leads:1", "Paris is big."), Paragraph("leads:2", "Rouen is not."), Paragraph("none", " ")]


def play(task=TASK, paragraphs=PARAGRAPHS, order=None, seed=(1, 1)):
    game = NextToken(task, EngineConfig(max_response_tokens=40), ByteTokenizer(), PLAIN)
    engine = TableEngine(lambda prompt, params: r"\boxed{i}", order=order)
    return game, asyncio.run(game.play(paragraphs, engine, seed))


def test_each_group_predicts_one_token_from_the_text_before_it():
    game, rollouts = play()
    texts = {p.id: p.text for p in PARAGRAPHS}
    assert len(rollouts) == 2 * 3 * 2  # in the third paragraph nothing can be asked for
    for rollout in rollouts:
        before = rollout.mask.masked_text.removesuffix("[mask]")
        assert rollout.role is Role.PREDICTOR and rollout.prompt == f"<pred>{before}[mask]"
        assert texts[rollout.paragraph_id].startswith(before + rollout.target)
        assert len(rollout.target) == 1  # a byte tokenizer's token
        assert rollout.reward == (rollout.target == "i")
    assert [group.id for group in game.groups(rollouts, 1)] == ["1.0.0", "1.0.1", "1.0.2", "1.1.0", "1.1.1", "1.1.2"]
    health = game.health(game.groups(rollouts, 1))
    assert health["mask/length_chars"] == 1 and "mask/valid_rate" not in health


def test_the_tokens_follow_the_seed_and_not_the_landing():
    _, first = play()
    assert play(order=random.Random(3))[1] == first
    assert [r.target for r in play(seed=(1, 2))[1]] != [r.target for r in first]


def test_by_entropy_only_the_hardest_tokens_are_asked_for():
    text = "Paris is big."
    hard = {2, 6}  # the r, and the i of "is"
    entropies = tuple(3.0 if place in hard else 1.0 for place in range(len(text)))
    paragraph = dataclasses.replace(PARAGRAPHS[0], token_entropies=entropies)
    # 2 of the 12 tokens that count
    task = dataclasses.replace(TASK, task="entropy_ntp", entropy_share=2 / 12, n_masks_per_paragraph=20)
    _, rollouts = play(task, [paragraph])
    assert {rollout.mask.masked_text for rollout in rollouts} == {"Pa[mask]", "Paris [mask]"}


def test_by_entropy_without_a_trainer_says_so():
    with pytest.raises(ConfigError, match=r"'entropy_ntp'.*only a trainer can.*random_ntp"):
        play(dataclasses.replace(TASK, task="entropy_ntp"))
