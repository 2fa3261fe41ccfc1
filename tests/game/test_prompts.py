"""Templates as files: what they say, what they leave open, and how a bad one is told."""

from pathlib import Path

import pytest
from builders import PLAIN, ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.errors import TemplateError, TokenizerError
from megatron_pz.game.prompts import OWN_TEMPLATES, Template, Templates, closing_token_ids
from megatron_pz.types import Role

EXAMPLES = Path(__file__).parents[2] / "examples" / "templates"


def _folder(path, mask="<gen>{paragraph}", prediction="<pred>{masked_paragraph}"):
    path.mkdir(exist_ok=True)
    (path / "mask.txt").write_text(mask, encoding="utf-8")
    (path / "prediction.txt").write_text(prediction, encoding="utf-8")
    return path


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_the_packages_own_templates_say_what_the_game_needs(style):
    templates = Templates.load("", style)
    mask, prediction = templates.mask_prompt("A TEXT."), templates.prediction_prompt("A [mask].")
    assert "\nA TEXT.\n" in mask and r"\mask{}" in mask
    assert "\nA [mask].\n" in prediction and r"\boxed{}" in prediction
    assert templates.mask.answer_prefix == templates.prediction.answer_prefix == ""


def test_plain_prompts_are_the_chat_wording_in_a_frame():
    for name in ("mask.txt", "prediction.txt"):
        chat, plain = ((OWN_TEMPLATES / style / name).read_text(encoding="utf-8") for style in ("chat", "plain"))
        assert plain == f"User: {chat}\nAssistant:\n"


def test_the_demo_prompts_are_a_tag_and_the_text():
    templates = Templates.load(EXAMPLES / "demo", "plain")
    assert (templates.mask_prompt("Paris."), templates.prediction_prompt("[mask].")) == ("<gen>Paris.", "<pred>[mask].")


def test_the_few_shot_prompts_end_inside_the_answer():
    templates = Templates.load(EXAMPLES / "smollm2", "plain")
    assert templates.mask_prompt("Paris.").endswith("Text: Paris.\nMask: \\mask{")
    assert templates.prediction_prompt("[mask].").endswith("Text: [mask].\nMissing: \\boxed{")
    assert (templates.mask.answer_prefix, templates.prediction.answer_prefix) == ("\\mask{", "\\boxed{")
    for template in (templates.mask, templates.prediction):
        assert template.text.count("\nText: ") == 4  # three shots and the question


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("{paragraph}", ""),
        ("{paragraph} inside \\mask{}.", ""),
        ("{paragraph} Mask: \\mask{", "\\mask{"),
        ("{paragraph} Mask: \\mask{ ", "\\mask{ "),
        ("{paragraph} \\mask{a} \\mask{the ", "\\mask{the "),
        ("\\mask{ {paragraph}", ""),  # opened before the text: not of the answer
        ("{paragraph} \\boxed{", ""),  # the other role's
    ],
)
def test_what_a_template_has_already_written_of_the_answer(text, prefix):
    assert Template(Role.GENERATOR, text, "f").answer_prefix == prefix


@given(st.text())
def test_text_is_put_in_as_it_is(text):
    assert PLAIN.mask_prompt(text) == "<gen>" + text
    assert PLAIN.prediction_prompt(text) == "<pred>" + text


def test_a_prediction_prompt_can_end_with_the_text_before_the_mask():
    template = Template(Role.PREDICTOR, "{masked_paragraph}\n{text_before_mask} \\boxed{", "f")
    assert template.fill("A b [mask] c [mask].") == "A b [mask] c [mask].\nA b \\boxed{"
    assert template.fill("[mask] b") == "[mask] b\n \\boxed{"
    assert template.fill("{text_before_mask} [mask]") == "{text_before_mask} [mask]\n{text_before_mask} \\boxed{"
    assert template.answer_prefix == "\\boxed{"
    assert Template(Role.PREDICTOR, "{masked_paragraph} \\boxed{ {text_before_mask}", "f").answer_prefix == ""


def test_only_the_editors_newline_is_left_out(tmp_path):
    folder = _folder(tmp_path, mask="a\n\n{paragraph}\n\n")
    assert Templates.load(folder, "plain").mask_prompt("T") == "a\n\nT\n"


def test_a_missing_placeholder_names_file_and_placeholder(tmp_path):
    with pytest.raises(TemplateError, match=r"prediction\.txt lacks its placeholder \{masked_paragraph\}"):
        Templates.load(_folder(tmp_path, prediction="no place"), "plain")
    with pytest.raises(
        TemplateError, match=r"mask\.txt lacks .* \{paragraph\} \(found \{masked_paragraph\}, which belongs"
    ):
        Templates.load(_folder(tmp_path, mask="{masked_paragraph}"), "plain")


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(TemplateError, match=r"no template .*mask\.txt"):
        Templates.load(tmp_path, "plain")
    _folder(tmp_path)
    (tmp_path / "mask.txt").write_bytes(b"\xff{paragraph}")
    with pytest.raises(TemplateError, match=r"mask\.txt cannot be read as UTF-8"):
        Templates.load(tmp_path, "plain")


def test_a_chat_turn_cannot_end_inside_the_answer(tmp_path):
    folder = _folder(tmp_path, mask="{paragraph} \\mask{")
    assert Templates.load(folder, "plain").mask.answer_prefix == "\\mask{"
    with pytest.raises(TemplateError, match="--prompt-style plain"):
        Templates.load(folder, "chat")


def test_a_plain_prompt_begins_as_the_tokenizer_begins_texts():
    tokenizer = ByteTokenizer(bos_token_ids=(9, 9))
    assert PLAIN.ids("ab", tokenizer) == [9, 9, 97, 98]


def test_a_chat_prompt_is_one_user_turn():
    chat = Templates.load("", "chat")
    assert chat.ids("ab", ByteTokenizer()) == ByteTokenizer().apply_chat("ab")
    with pytest.raises(TokenizerError):
        chat.ids("ab", ByteTokenizer(has_chat=False))


def test_a_response_ends_with_the_brace_that_the_prompt_opened():
    tokenizer = ByteTokenizer()
    few_shot = Templates.load(EXAMPLES / "smollm2", "plain")
    assert closing_token_ids(tokenizer) == (ord("}"),)
    assert few_shot.stop_token_ids(Role.PREDICTOR, tokenizer) == (256, 257, ord("}"))
    assert PLAIN.stop_token_ids(Role.PREDICTOR, tokenizer) == (256, 257)
