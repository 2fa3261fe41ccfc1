"""Questions that never change, and their score."""

import asyncio
import random

import pytest
from builders import PLAIN, ByteTokenizer, TableEngine

from megatron_pz.config.schema import EngineConfig, EvaluateConfig, TaskConfig
from megatron_pz.errors import CorpusError
from megatron_pz.evaluate.fixed_masks import fixed_set, score, shuffled_set, wilson_interval
from megatron_pz.report.metrics import check
from megatron_pz.tasks.ask import Asker
from megatron_pz.types import Paragraph

TASK = TaskConfig(max_prompt_tokens=120, span_max_words=2)
ASKER = Asker(TASK, EngineConfig(max_response_tokens=40, temperature=0.7), ByteTokenizer(), PLAIN)
TEXTS = [
    Paragraph(f"leads:{i}", text)
    for i, text in enumerate(
        (
            "Paris is the capital of France and lies on the Seine.",
            "The Seine flows through Paris, then past Rouen.",
            "Iron has the symbol Fe and the atomic number 26.",
        )
    )
]


def made(config=None, texts=TEXTS, asker=ASKER, task=TASK):
    return fixed_set("fixed_masks", texts, asker, config or EvaluateConfig(num_fixed_masks=6), task)


def scored(reply, config, order=None):
    engine = TableEngine(reply, order=order)
    metrics, rows = asyncio.run(score(made(config), ASKER, engine, config))
    return metrics, rows, engine.requests


def test_the_same_questions_come_every_time_and_others_with_another_seed():
    config = EvaluateConfig(num_fixed_masks=6)
    assert made(config) == made(config)
    assert len(made(config).masks) == 6
    assert made(EvaluateConfig(num_fixed_masks=6, fixed_mask_seed=8)).masks != made(config).masks


def test_each_question_hides_words_of_its_text_and_fits_the_prompt():
    texts = {p.id: p.text for p in TEXTS}
    for mask in made().masks:
        start, end = mask.spans[0]
        assert texts[mask.paragraph_id][start:end] == mask.answer
        assert "[mask]" in mask.masked_text and len(mask.answer.split()) <= 2
        assert ASKER.fits(mask)


def test_text_without_a_word_to_hide_is_told_with_the_way_out():
    with pytest.raises(CorpusError, match="on the 1 paragraphs of the set 'fixed_masks'.*--eval-interval 0"):
        made(texts=[Paragraph("none", "... --- ...")])


def test_accuracy_is_the_share_of_exact_answers():
    config = EvaluateConfig(num_fixed_masks=6)
    target = {"<pred>" + mask.masked_text: mask.answer for mask in made(config).masks}
    right = set(list(target)[:2])

    def reply(prompt, params):
        return rf"\boxed{{ {target[prompt]}}}" if prompt in right else "no box here"

    metrics, rows, _ = scored(reply, config)
    num_right = sum("<pred>" + mask.masked_text in right for mask in made(config).masks)
    assert metrics == {
        "eval/fixed_masks/accuracy": pytest.approx(num_right / 6),
        "eval/fixed_masks/format_rate": pytest.approx(num_right / 6),
    }
    check(metrics)
    assert [row["reward"] for row in rows] == [1.0 if row["prompt"] in right else 0.0 for row in rows]
    assert {row["set"] for row in rows} == {"fixed_masks"}
    assert rows[0]["answer"] == rows[0]["target"] and rows[-1]["answer"] is None and rows[-1]["valid"] is False


def test_answers_are_drawn_with_the_same_seeds_at_every_scoring_whatever_lands_first():
    config = EvaluateConfig(num_fixed_masks=4, n_samples_per_fixed_mask=3, eval_temperature=0.5)

    def reply(prompt, params):
        return rf"\boxed{{ {random.Random(params.seed).choice(['Paris', 'the', 'Fe'])}}}"

    first, rows, asked = scored(reply, config)
    again = scored(reply, config, order=random.Random(5))
    assert (first, rows) == again[:2]
    assert len(rows) == len(asked) == 12
    assert len({params.seed for _, params in asked}) == 12  # each answer has its own draw
    assert {params.temperature for _, params in asked} == {0.5}  # not the engine's
    assert len({row["mask_id"] for row in rows}) == 4


def test_the_confidence_interval_is_wilson_s():
    # p = 0.5, n = 4, z = 1.96: 0.5 -+ 0.3500 (Wilson 1927)
    low, high = wilson_interval(2, 4)
    assert (low, high) == (pytest.approx(0.1500, abs=2e-4), pytest.approx(0.8500, abs=2e-4))
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0


def test_the_probe_asks_the_same_questions_with_the_same_words_in_another_order():
    config = EvaluateConfig(num_fixed_masks=6)
    questions = made(config)
    probe = shuffled_set(questions, ASKER, config)
    assert probe == shuffled_set(questions, ASKER, config) and probe.name == "shuffled"
    pairs = list(zip(questions.masks, probe.masks, strict=True))
    for asked, mixed in pairs:
        assert mixed.answer == asked.answer and ASKER.fits(mixed)
        assert sorted(mixed.masked_text.split()) == sorted(asked.masked_text.replace("[mask]", " [mask] ").split())
    assert all(mixed.masked_text != asked.masked_text for asked, mixed in pairs)
    metrics, _ = asyncio.run(score(probe, ASKER, TableEngine(lambda prompt, params: "\\boxed{Fe}"), config))
    check(metrics)
    assert set(metrics) == {"eval/shuffled/accuracy", "eval/shuffled/format_rate"}


def test_a_shuffled_question_that_no_longer_fits_is_left_out():
    questions = made()
    tight = Asker(TaskConfig(max_prompt_tokens=60, span_max_words=2), EngineConfig(), ByteTokenizer(), PLAIN)
    probe = shuffled_set(questions, tight, EvaluateConfig())
    assert len(probe.masks) < len(questions.masks) and all(tight.fits(mask) for mask in probe.masks)
