"""Test sets in their published formats become questions and prompts."""

import json

import pytest
from evaluate_samples import BBEH_TASK, GSM8K, MMLU_PRO, SETS, write_sets

from megatron_pz.errors import ConfigError, CorpusError, TemplateError
from megatron_pz.evaluate.suites.asking import fill, load_prompt
from megatron_pz.evaluate.suites.formats import Question
from megatron_pz.evaluate.suites.load import load_questions, suite_of
from megatron_pz.evaluate.suites.table import MATH, PAPER, SUITES

TARGETS = {
    "mmlu_pro": ["C", "B"],
    "supergpqa": ["B"],
    "bbeh": ["True", "apple, pear"],
    "math500": [r"\frac{1}{2}"],
    "olympiad": ["5"],
    "minerva": ["1.5e-3"],
    "gsm8k": ["1,200", "3"],
    "amc23": ["27"],
    "aime24": ["204"],
    "math": ["2"],
}


@pytest.fixture
def folder(tmp_path):
    return write_sets(tmp_path / "sets")


@pytest.mark.parametrize("name", SUITES)
def test_a_published_row_becomes_a_question_with_its_answer(folder, name):
    assert [question.target for question in load_questions(SUITES[name], folder)] == TARGETS[name]


@pytest.mark.parametrize("name", ["mmlu_pro", "olympiad", "gsm8k"])
def test_parquet_and_json_say_the_same_as_jsonl(folder, tmp_path, name):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(SETS[name]), tmp_path / f"{name}.parquet")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / f"{name}.json").write_text(json.dumps(SETS[name]))
    wanted = load_questions(SUITES[name], folder)
    assert load_questions(SUITES[name], tmp_path) == load_questions(SUITES[name], tmp_path / "json") == wanted


def test_bbeh_is_read_as_in_its_repository(tmp_path):
    (tmp_path / "bbeh" / "bbeh_logic").mkdir(parents=True)
    (tmp_path / "bbeh" / "bbeh_logic" / "task.json").write_text(json.dumps(BBEH_TASK))
    (question,) = load_questions(SUITES["bbeh"], tmp_path)
    assert (question.text, question.target, question.category) == ("Is 3 odd?", "(A)", "bbeh_logic")


def test_options_are_lettered_and_those_that_are_none_are_left_out(folder):
    first, second = load_questions(SUITES["mmlu_pro"], folder)
    prompt = fill(load_prompt(SUITES["mmlu_pro"]), second)
    assert prompt.startswith(second.text) and "(A): oxygen\n(B): carbon dioxide\n(C): helium\n" in prompt
    assert first.category == "math"


def test_a_question_that_looks_like_a_placeholder_is_not_filled_in():
    question = Question("1", "{options}?", "A", ("x",))
    assert fill("{question}|{options}", question) == "{options}?|(A): x"


def test_prompts_come_from_a_folder_by_suite_or_by_kind(tmp_path):
    (tmp_path / "gsm8k.txt").write_text("Q: {question}\n")
    (tmp_path / "math.txt").write_text("M: {question}\n")
    assert load_prompt(SUITES["gsm8k"], tmp_path) == "Q: {question}"
    assert load_prompt(SUITES["amc23"], tmp_path) == "M: {question}"
    (tmp_path / "choice.txt").write_text("{question}")
    with pytest.raises(TemplateError, match=r"choice\.txt lacks its placeholder \{options\}"):
        load_prompt(SUITES["mmlu_pro"], tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("gsm8k", {"question": "?"}, r"none of `answer`, `final_answer`, `solution`"),
        ("gsm8k", {"answer": "1"}, r"none of `question`"),
        ("mmlu_pro", {**MMLU_PRO[0], "answer": "Z"}, r"wanted a letter of A to E"),
        ("mmlu_pro", {**MMLU_PRO[0], "options": "4"}, r"`options` is '4'"),
        ("bbeh", {"input": "?"}, r"`target`"),
    ],
)
def test_a_row_that_is_not_as_published_is_named(tmp_path, name, row, told):
    with pytest.raises(CorpusError, match=rf"{name}:1: .*{told}"):
        load_questions(SUITES[name], write_sets(tmp_path, **{name: [row]}))


def test_a_question_twice_is_refused_and_an_id_twice_is_not(tmp_path):
    with pytest.raises(CorpusError, match="stands twice"):
        load_questions(SUITES["mmlu_pro"], write_sets(tmp_path / "a", mmlu_pro=[MMLU_PRO[0]] * 2))
    two = [{**row, "id": 1} for row in GSM8K]
    assert len(load_questions(SUITES["gsm8k"], write_sets(tmp_path / "b", gsm8k=two))) == 2


def test_a_set_that_cannot_be_had_says_where_to_put_it(tmp_path):
    with pytest.raises(CorpusError, match=r"gsm8k\.jsonl, \.json or \.parquet into the folder that --data names"):
        load_questions(SUITES["gsm8k"], tmp_path)
    with pytest.raises(ConfigError, match="no test set 'gsm9k'"):
        suite_of("gsm9k")


def test_the_papers_nine_sets():
    assert len(PAPER) == 9 and len(MATH) == 6 and set(PAPER) < set(SUITES)
    assert [SUITES[name].num_samples for name in ("amc23", "aime24", "math500")] == [32, 32, 1]
