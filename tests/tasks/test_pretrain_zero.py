"""A round of PretrainZero, played with an engine that answers from a table."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest
from builders import PLAIN, ByteTokenizer, TableEngine

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.errors import ConfigError, CorpusError, EngineError, TokenizerError
from megatron_pz.game.prompts import Templates
from megatron_pz.tasks.pretrain_zero import PretrainZero
from megatron_pz.types import Paragraph, Role

TASK = TaskConfig(n_masks_per_paragraph=4, n_predictions_per_mask=4, prompt_style="plain", max_prompt_tokens=80)
ENGINE = EngineConfig(max_response_tokens=40, temperature=0.9, top_p=0.95)
PARIS = Paragraph("leads:1", "Paris is the capital of France.")
SEINE = Paragraph("leads:2", "The Seine flows through Paris and past Paris.")
SEED = (1234, 5)


def _play(engine, paragraphs=(PARIS,), task=TASK, templates=PLAIN, tokenizer=None, seed=SEED):
    game = PretrainZero(task, ENGINE, tokenizer or ByteTokenizer(), templates)
    rollouts = asyncio.run(game.play(paragraphs, engine, seed))
    return game, rollouts


def _by_seed(prompt, params):
    """A reply that is a function of the request alone: four kinds of mask, predictions right now and then."""
    rng = random.Random(params.seed)
    if prompt.startswith("<gen>"):
        return rng.choice([r"\mask{ Paris}", r"\mask{ the}", r"\mask{ Rome}", "no mask at all"])
    return rng.choice([r"\boxed{ Paris}", r"\boxed{ the}", "no box"])


def _always(mask, *answers):
    """Every mask rollout names `mask`; the predictions answer in turn."""
    turns = iter(answers * 999)
    return lambda prompt, params: f"\\mask{{ {mask}}}" if prompt.startswith("<gen>") else f"\\boxed{{ {next(turns)}}}"


def test_each_mask_is_followed_by_its_predictions_paid_by_equations_8_and_9():
    game, rollouts = _play(TableEngine(_always("Paris", "Paris", "Rome", "Rome", "Rome")))
    assert [str(r.role) for r in rollouts] == ["mask", *["prediction"] * 4] * 4
    for start in range(0, 20, 5):
        mask_rollout, *predictions = rollouts[start : start + 5]
        assert [p.reward for p in predictions] == [1.0, 0.0, 0.0, 0.0]
        assert mask_rollout.reward == 0.75  # 1 - 1/4
        assert {p.mask_id for p in predictions} == {p.group_id for p in predictions} == {mask_rollout.mask_id}
        assert all(p.target == "Paris" and p.mask == mask_rollout.mask for p in predictions)
        assert {p.prompt for p in predictions} == {"<pred>[mask] is the capital of France."}
    assert [r.mask_id for r in rollouts if r.role is Role.GENERATOR] == ["5.0.0", "5.0.1", "5.0.2", "5.0.3"]
    assert {r.group_id for r in rollouts if r.role is Role.GENERATOR} == {"5.0"}


def test_a_question_that_was_asked_before_is_not_tokenized_again():
    class Counting(ByteTokenizer):
        texts = []

        def encode(self, text):
            self.texts.append(text)
            return super().encode(text)

    _, rollouts = _play(TableEngine(_always("Paris", "Paris")), tokenizer=Counting())
    assert len(rollouts) == 4 * (1 + 4)
    asked = [text for text in Counting.texts if text.startswith("<pred>[mask]")]
    assert asked == [
        "<pred>[mask] is the capital of France."
    ]  # of four equal masks, looked at for its length and then asked


@pytest.mark.parametrize(("answers", "reward"), [(["Paris"], 0.0), (["Rome"], 0.0), (["Paris", "Rome"], 0.5)])
def test_a_mask_that_everybody_or_nobody_solves_earns_nothing(answers, reward):
    _, rollouts = _play(TableEngine(_always("Paris", *answers)))
    assert {r.reward for r in rollouts if r.role is Role.GENERATOR} == {reward}


def test_an_invalid_mask_earns_nothing_is_predicted_by_nobody_and_stays_in_its_group():
    replies = iter([r"\mask{ Rome}", r"\mask{ Paris}", "nothing", r"\mask{ Paris}"])
    answers = iter(["Paris", "Rome", "Rome", "Rome"] * 2)
    engine = TableEngine(
        lambda prompt, _: next(replies) if prompt.startswith("<gen>") else f"\\boxed{{ {next(answers)}}}"
    )
    game, rollouts = _play(engine)
    assert len(engine.requests) == len(rollouts) == 4 + 2 * 4
    masks = [r for r in rollouts if r.role is Role.GENERATOR]
    assert [(r.valid, r.reject_reason, r.reward) for r in masks] == [
        (False, "not_in_paragraph", 0.0),
        (True, None, 0.75),
        (False, "no_mask", 0.0),
        (True, None, 0.75),
    ]
    [group] = [g for g in game.groups(rollouts, step=5) if g.role is Role.GENERATOR]
    assert group.rollouts == tuple(masks) and group.trained
    # rewards 0, 3/4, 0, 3/4: mean 3/8, unbiased std 0.4330127
    assert group.advantages == pytest.approx([-0.8660, 0.8660, -0.8660, 0.8660], abs=1e-4)


def test_predictions_start_as_soon_as_their_own_mask_lands():
    first_has_predictions = asyncio.Event()
    masks = iter(range(4))

    async def generate(prompt_ids, params):
        prompt = ByteTokenizer().decode(prompt_ids)
        if not prompt.startswith("<gen>"):
            first_has_predictions.set()
        elif next(masks) > 0:
            await first_has_predictions.wait()  # for ever, if predictions waited until all masks are there
        return await table(prompt_ids, params)

    table = TableEngine(_always("Paris", "Paris", "Rome"))
    game = PretrainZero(TASK, ENGINE, ByteTokenizer(), PLAIN)
    rollouts = asyncio.run(asyncio.wait_for(game.play([PARIS], generate, SEED), timeout=10))
    assert len(rollouts) == 20


def test_the_round_does_not_depend_on_the_order_of_landing():
    paragraphs = [PARIS, SEINE, PARIS]
    _, wanted = _play(TableEngine(_by_seed), paragraphs)
    for shuffle in range(5):
        _, found = _play(TableEngine(_by_seed, order=random.Random(shuffle)), paragraphs)
        assert found == wanted
    assert Counter(r.valid for r in wanted if r.role is Role.GENERATOR)[False] > 0  # the table names Rome, too


def test_no_two_requests_of_a_run_share_a_seed_even_on_a_paragraph_drawn_twice():
    seeds = []
    for seed in (SEED, (1234, 6), (1235, 5)):
        engine = TableEngine(_by_seed)
        _play(engine, [PARIS, PARIS], seed=seed)
        seeds += [params.seed for _, params in engine.requests]
    assert len(set(seeds)) == len(seeds) > 3 * 8


def test_requests_carry_the_settings_of_the_engine():
    engine = TableEngine(_by_seed)
    _play(engine)
    for _, params in engine.requests:
        assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k) == (40, 0.9, 0.95, 0)
        assert params.stop_token_ids == (256, 257)


def test_a_truncated_mask_and_a_truncated_prediction_earn_nothing():
    long = "x" * 40
    _, masks = _play(TableEngine(lambda prompt, params: r"\mask{ Paris}" + long))
    assert [(r.reject_reason, r.answer, r.reward) for r in masks] == [("truncated", "Paris", 0.0)] * 4
    engine = TableEngine(lambda p, _: r"\mask{ Paris}" if p.startswith("<gen>") else r"\boxed{ Paris}" + long)
    _, rollouts = _play(engine)
    predictions = [r for r in rollouts if r.role is Role.PREDICTOR]
    assert {(r.valid, r.reject_reason, r.reward) for r in predictions} == {(False, "truncated", 0.0)}


def test_a_mask_whose_question_is_too_long_is_invalid():
    # 31 characters and the tag fit into 37 tokens; seven masks of six characters in place of seven letters do not.
    text = "a b a b a b a b a b a b a b long"
    task = TaskConfig(n_masks_per_paragraph=2, n_predictions_per_mask=2, prompt_style="plain", max_prompt_tokens=37)
    _, rollouts = _play(TableEngine(_always("b", "b")), [Paragraph("p", text)], task)
    assert [(r.valid, r.reject_reason, r.answer) for r in rollouts] == [(False, "prompt_too_long", "b")] * 2


def test_a_paragraph_too_long_for_the_prompt_is_refused_with_the_numbers():
    with pytest.raises(CorpusError, match=r"paragraph leads:9 has 95 tokens; task.max_prompt_tokens is 80"):
        _play(TableEngine(_by_seed), [PARIS, Paragraph("leads:9", "word " * 18)])


def test_a_template_without_room_for_text_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"has 5 tokens before any text .*max_prompt_tokens is 5"):
        PretrainZero(TaskConfig(max_prompt_tokens=5), ENGINE, ByteTokenizer(), PLAIN)


def test_chat_without_a_chat_template_is_refused_at_once():
    with pytest.raises(TokenizerError, match="plain"):
        PretrainZero(TaskConfig(), ENGINE, ByteTokenizer(has_chat=False), Templates.load("", "chat"))


def test_an_engines_error_arrives_as_itself_and_ends_the_round():
    async def generate(prompt_ids, params):
        await asyncio.sleep(0)
        raise EngineError("the server went away")

    async def play():
        game = PretrainZero(TASK, ENGINE, ByteTokenizer(), PLAIN)
        with pytest.raises(EngineError, match="went away"):
            await game.play([PARIS, SEINE], generate, SEED)
        assert asyncio.all_tasks() == {asyncio.current_task()}  # nothing is left running

    asyncio.run(play())


def test_groups_of_the_other_role_wait_under_alternate_updates():
    task = TaskConfig(n_masks_per_paragraph=4, n_predictions_per_mask=4, update="alternate", max_prompt_tokens=80)
    game, rollouts = _play(TableEngine(_by_seed), [PARIS, SEINE], task)
    informative = {g.id: any(g.advantages) for g in game.groups(rollouts, 1)}
    for step, due in ((1, Role.GENERATOR), (2, Role.PREDICTOR), (3, Role.GENERATOR)):
        groups = game.groups(rollouts, step)
        assert {g.role for g in groups if g.trained} == {due}
        assert all(g.trained == informative[g.id] for g in groups if g.role is due)


def test_every_rollout_is_in_one_group_and_flat_groups_are_dropped():
    game, rollouts = _play(TableEngine(_by_seed), [PARIS, SEINE])
    groups = game.groups(rollouts, step=1)
    assert Counter(id(r) for g in groups for r in g.rollouts) == Counter(map(id, rollouts))
    for group in groups:
        assert len(group.rollouts) == 4
        assert group.trained == (len({r.reward for r in group.rollouts}) > 1)
    assert {g.trained for g in groups} == {True, False}  # the table makes both


def test_a_prompt_that_opens_the_answer_is_read_on_from_there():
    folder = Path(__file__).parents[2] / "examples" / "templates" / "smollm2"
    templates = Templates.load(folder, "plain")
    task = TaskConfig(n_masks_per_paragraph=1, n_predictions_per_mask=2, prompt_style="plain")
    engine = TableEngine(lambda prompt, _: "Paris}" if prompt.endswith("\\mask{") else " Paris}")
    _, rollouts = _play(engine, task=task, templates=templates)
    assert [(r.response, r.answer, r.valid) for r in rollouts] == [
        ("Paris}", "Paris", True),
        (" Paris}", "Paris", True),
        (" Paris}", "Paris", True),
    ]
    assert all(ord("}") in params.stop_token_ids for _, params in engine.requests)


def test_a_chat_round_is_framed_by_the_tokenizer():
    task = TaskConfig(n_masks_per_paragraph=1, n_predictions_per_mask=1)
    engine = TableEngine(lambda prompt, _: r"\mask{Paris}" if "choose one span" in prompt else r"\boxed{Paris}")
    _, rollouts = _play(engine, task=task, templates=Templates.load("", "chat"))
    assert all(r.prompt.startswith("<user>") and r.prompt.endswith("<assistant>") for r in rollouts)
    assert [r.reward for r in rollouts] == [0.0, 1.0]
    assert rollouts[0].completion.prompt_ids[-len("<assistant>") - 1] == ByteTokenizer.END_OF_TURN
