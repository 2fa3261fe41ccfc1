"""Whole rounds over the Korean and Chinese example texts: no dictionary, no white space between words, two Unicode forms."""

import asyncio
import random
from pathlib import Path
from unicodedata import normalize

import pytest
from builders import PLAIN, ByteTokenizer, TableEngine

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.corpus.quality import quality_reason
from megatron_pz.corpus.reader import read_paragraphs
from megatron_pz.game.masking import MASK_TOKEN, cuts_no_word, restore
from megatron_pz.game.rewards import mask_reward
from megatron_pz.tasks.pretrain_zero import PretrainZero
from megatron_pz.tasks.random_span import RandomSpan
from megatron_pz.types import Paragraph, Role
from megatron_pz.words import words

FOLDER = Path(__file__).parents[2] / "examples" / "corpora"
TEXTS = {language: read_paragraphs(FOLDER / f"{language}.jsonl")[0] for language in ("ko", "zh")}
ENGINE = EngineConfig(max_response_tokens=1000)
WHOLE = TaskConfig(
    n_masks_per_paragraph=6, n_predictions_per_mask=3, max_prompt_tokens=4000, mask_validity="whole_words"
)


def hidden(prompt, paragraphs):
    """What stands behind `[mask]` in a prediction prompt."""
    pieces = prompt.removeprefix("<pred>").split(MASK_TOKEN)
    (text,) = [p.text for p in paragraphs if p.text.startswith(pieces[0]) and p.text.endswith(pieces[-1])]
    size, rest = divmod(len(text) - sum(map(len, pieces)), len(pieces) - 1)
    assert rest == 0
    return text[len(pieces[0]) : len(pieces[0]) + size]


def play(game, paragraphs, reply, task=WHOLE):
    engine = TableEngine(reply, order=random.Random(5))
    made = game(task, ENGINE, ByteTokenizer(), PLAIN)
    rollouts = asyncio.run(made.play(paragraphs, engine, (3, 1)))
    return rollouts, made.health(made.groups(rollouts, 1))


@pytest.mark.parametrize("language", TEXTS)
def test_the_example_texts_are_of_their_language_and_pass_its_filters(language):
    assert len(TEXTS[language]) == 6
    assert [quality_reason(p.text, language) for p in TEXTS[language]] == [None] * 6
    other = "zh" if language == "ko" else "ko"
    assert {quality_reason(p.text, other) for p in TEXTS[language]} == {"wrong_script"}


@pytest.mark.parametrize(
    ("language", "named", "reason", "occurrences", "answers"),
    [
        # The unit between spaces: a noun without its particle is a part of a word.
        ("ko", "물고기를", None, 2, {"물고기를": 1, normalize("NFD", "물고기를"): 1, "물고기는": 0}),
        ("ko", "물고기", "partial_word", 0, {}),
        ("ko", "생선", "not_in_paragraph", 0, {}),
        # Any run of characters; U+FA2C is a compatibility form of the second, the simplified character is another word.
        ("zh", "茶館", None, 2, {"茶館": 1, "茶\ufa2c": 1, "茶馆": 0}),
        ("zh", "茶樓", "not_in_paragraph", 0, {}),
    ],
)
def test_a_word_that_the_policy_names_is_hidden_everywhere_and_predicted(language, named, reason, occurrences, answers):
    turns = iter([*answers] * 99)

    def reply(prompt, params):
        return f"\\mask{{{named}}}" if prompt.startswith("<gen>") else f"\\boxed{{{next(turns)}}}"

    first = TEXTS[language][0]
    rollouts, health = play(PretrainZero, [first], reply)
    masks = [r for r in rollouts if r.role is Role.GENERATOR]
    assert {r.reject_reason for r in masks} == {reason} and health["mask/valid_rate"] == (reason is None)
    predictions = [r for r in rollouts if r.role is Role.PREDICTOR]
    assert len(predictions) == 6 * len(answers)
    for rollout in predictions:
        assert rollout.mask.num_occurrences == rollout.mask.masked_text.count(MASK_TOKEN) == occurrences
        assert named not in rollout.mask.masked_text and restore(rollout.mask) == first.text
        assert rollout.reward == answers[rollout.answer]
    for mask in masks:
        own = [r.reward for r in predictions if r.mask_id == mask.mask_id]
        assert mask.reward == (mask_reward(int(sum(own)), len(own)) if own else 0.0)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("language", TEXTS)
def test_chance_hides_whole_words_and_either_unicode_form_of_the_answer_is_right(language, form):
    paragraphs = [Paragraph(p.id, normalize(form, p.text)) for p in TEXTS[language]]

    def wrong(answer):
        return answer + "다"

    def reply(prompt, params):
        answer = hidden(prompt, paragraphs)
        other = normalize("NFD" if form == "NFC" else "NFC", answer)
        return f"\\boxed{{{other if params.seed % 2 else wrong(answer)}}}"

    rollouts, health = play(RandomSpan, paragraphs, reply)
    assert len(rollouts) == 6 * 6 * 3 and {r.reward for r in rollouts} == {0.0, 1.0}
    texts = {p.id: p.text for p in paragraphs}
    for rollout in rollouts:
        text, mask = texts[rollout.paragraph_id], rollout.mask
        assert restore(mask) == text and all(cuts_no_word(text, span) for span in mask.spans)
        assert rollout.reward == (rollout.answer != wrong(mask.answer))
        pieces = [text[: mask.spans[0][0]], mask.answer, text[mask.spans[0][1] :]]
        # No syllable was parted: composing the pieces is composing the text.
        assert "".join(normalize("NFC", piece) for piece in pieces) == normalize("NFC", text)
    assert max(len(words(r.mask.answer)) for r in rollouts) > 1 and health["mask/whole_word_share"] == 1.0
    if language == "ko":
        assert all(" " in r.mask.answer for r in rollouts if len(words(r.mask.answer)) > 1)


def test_full_width_digits_are_the_digits_of_the_text():
    lighthouse = [p for p in TEXTS["zh"] if "28公尺" in p.text]
    rollouts, _ = play(
        PretrainZero, lighthouse, lambda prompt, _: "\\mask{28}" if prompt.startswith("<gen>") else "\\boxed{２８}"
    )
    assert {r.reward for r in rollouts if r.role is Role.PREDICTOR} == {1.0}
    assert lighthouse[0].text.replace("28", MASK_TOKEN) in {r.mask.masked_text for r in rollouts}
