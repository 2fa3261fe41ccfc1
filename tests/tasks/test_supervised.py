"""Supervised samples, token for token (a byte is a token here)."""

from pathlib import Path

import pytest
from builders import PLAIN, ByteTokenizer

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.game.prompts import Templates
from megatron_pz.tasks.supervised import ContinuePretraining, SupervisedFormats
from megatron_pz.types import Paragraph, Role

PARAGRAPH = Paragraph("leads:1", "Paris is the capital of France and lies on the Seine.")
TOKENIZER = ByteTokenizer()
TASK = TaskConfig(task="sft", span_max_words=1, answer_weight=10.0, prompt_weight=1.0, prompt_style="plain")


def _sft(task=TASK, templates=PLAIN, tokenizer=TOKENIZER):
    return SupervisedFormats(task, EngineConfig(), tokenizer, templates)


def test_a_paragraph_is_one_sequence_with_its_end():
    [sample] = ContinuePretraining(TOKENIZER).samples([Paragraph("p", "abc")], (1, 1))
    assert sample.token_ids == (97, 98, 99, 256)
    assert sample.loss_weights == (0.0, 1.0, 1.0, 1.0)  # nothing comes before the first token
    assert sample.rollout_log_probs == (0.0,) * 4
    assert sample.role is None


def test_a_beginning_token_makes_the_first_of_the_text_trainable():
    [sample] = ContinuePretraining(ByteTokenizer(bos_token_ids=(9,))).samples([Paragraph("p", "abc")], (1, 1))
    assert (sample.token_ids, sample.loss_weights) == ((9, 97, 98, 99, 256), (0.0, 1.0, 1.0, 1.0, 1.0))


def test_each_paragraph_gives_a_mask_example_and_a_prediction_example():
    mask, prediction = _sft().samples([PARAGRAPH], (1, 1))
    prompt, response = TOKENIZER.decode(mask.token_ids).split("\\mask{ ")
    assert prompt == "<gen>" + PARAGRAPH.text
    assert response.removesuffix("}") in PARAGRAPH.text
    masked, answer = TOKENIZER.decode(prediction.token_ids).removesuffix("}").split("\\boxed{ ")
    assert masked.removeprefix("<pred>").replace("[mask]", answer) == PARAGRAPH.text
    assert mask.token_ids[-1] == prediction.token_ids[-1] == 256


def test_prompt_and_answer_have_their_weights_and_the_first_token_none():
    for sample in _sft().samples([PARAGRAPH], (1, 1)):
        text = TOKENIZER.decode(sample.token_ids)
        length = text.index("\\")  # the response begins at its command
        assert sample.loss_weights[0] == 0.0
        assert set(sample.loss_weights[1:length]) == {1.0}
        assert set(sample.loss_weights[length:]) == {10.0} and len(sample.loss_weights) == len(text) + 1
        assert sample.role is None


def test_spans_are_new_at_each_step_and_the_same_when_it_is_repeated():
    steps = [_sft().samples([PARAGRAPH], (1, step)) for step in range(1, 9)]
    assert steps == [_sft().samples([PARAGRAPH], (1, step)) for step in range(1, 9)]
    assert len({samples[1].token_ids for samples in steps}) > 3


def test_span_lengths_stay_within_the_settings():
    for limit in (1, 3):
        task = TaskConfig(task="sft", span_max_words=limit, span_p=0.05)
        answers = [
            TOKENIZER.decode(sample.token_ids).rpartition("{ ")[2].removesuffix("}")
            for step in range(60)
            for sample in _sft(task).samples([PARAGRAPH], (1, step))
        ]
        assert max(len(answer.split()) for answer in answers) == limit


def test_a_paragraph_without_a_valid_span_has_no_examples():
    assert _sft().samples([Paragraph("p", "..."), PARAGRAPH], (1, 1))[0].group_id == "1.1.mask"
    assert len(_sft().samples([Paragraph("p", "...")], (1, 1))) == 0


@pytest.mark.parametrize(("role", "wanted"), [(Role.GENERATOR, " Paris}"), (Role.PREDICTOR, " Paris}")])
def test_an_answer_that_the_prompt_opened_is_not_written_twice(role, wanted):
    folder = Path(__file__).parents[2] / "examples" / "templates" / "smollm2"
    assert _sft(templates=Templates.load(folder, "plain")).response(role, "Paris") == wanted
    assert _sft().response(role, "Paris") == ("\\mask" if role is Role.GENERATOR else "\\boxed") + "{ Paris}"
