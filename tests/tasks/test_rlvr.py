"""RL with verified rewards: what is paid, and what is left out."""

import asyncio
import socket

import pytest
from builders import PLAIN, ByteTokenizer, TableEngine
from metric_ranges import out_of_range

from megatron_pz.config.schema import EngineConfig, TaskConfig, VerifierConfig
from megatron_pz.corpus.questions import read_questions
from megatron_pz.engine.openai_url import Told
from megatron_pz.engine.sglang.faults import ServerRefused
from megatron_pz.errors import CorpusError, TemplateError
from megatron_pz.grade.general_verifier import load_template
from megatron_pz.report.metrics import METRICS, check
from megatron_pz.tasks.rlvr import Rlvr
from megatron_pz.tasks.verifiers import ModelVerifier, RuleVerifier
from megatron_pz.types import Paragraph, Role

TASK = TaskConfig(task="rlvr", prompt_style="plain", n_predictions_per_mask=4, max_prompt_tokens=200)
QUESTION = Paragraph("q:1", "What is one half?", answer="1/2")
SAID = [r"\boxed{1/2}", r"so \boxed{0.50000}", r"\boxed{3}", "one half"]


def game(verifier, **settings):
    engine = EngineConfig(max_response_tokens=60)
    return Rlvr(TASK, engine, ByteTokenizer(), PLAIN, VerifierConfig(**settings), verifier)


def play(task, said=SAID, seed=(1, 3)):
    told = iter(said)
    return asyncio.run(task.play([QUESTION], TableEngine(lambda prompt, params: next(told)), seed))


async def knows(question, truth, answer):
    return answer in ("1/2", "0.50000")


def test_right_wrong_and_no_answer_are_paid_as_in_the_paper():
    task = game(knows)
    rollouts = play(task)
    # "0.50000" is 7 bytes, "1/2" 3: 1 - 0.05 * 4
    assert [rollout.reward for rollout in rollouts] == pytest.approx([1.0, 0.8, 0.0, -0.5])
    assert [rollout.reject_reason for rollout in rollouts] == [None, None, None, "no_box"]
    assert {(r.role, r.group_id, r.target, r.paragraph_id) for r in rollouts} == {(Role.PREDICTOR, "3.0", "1/2", "q:1")}
    assert rollouts[0].prompt.startswith("Question: What is one half?\n")
    (group,) = task.groups(rollouts, 3)
    assert group.trained and len(group.advantages) == 4
    found = task.health([group])
    assert {name for name in METRICS if name.startswith("verifier/")} <= set(found)
    check(found)
    assert out_of_range(found) == []
    assert found["verifier/right_share"] == 0.5 and found["verifier/unverified_share"] == 0.0
    assert found["verifier/length_penalty"] == pytest.approx(0.1)
    assert found["prediction/format_rate"] == 0.75 and found["reward/prediction/mean"] == pytest.approx(0.325)


def test_the_length_penalty_ends_at_its_cap_and_may_be_off():
    long = r"\boxed{1/2 or, which is the same, 0.5}"

    async def yes(question, truth, answer):
        return True

    assert [r.reward for r in play(game(yes), [long] * 4)] == [0.5] * 4
    assert [r.reward for r in play(game(yes, length_penalty=0.0), [long] * 4)] == [1.0] * 4
    task = game(yes)
    assert task.health(task.groups(play(task, [long] * 4), 3))["groups/all_right_share"] == 1.0
    assert task.health(task.groups(play(task, ["none"] * 4), 3))["groups/all_wrong_share"] == 1.0


def test_the_verifier_is_not_asked_where_there_is_no_answer():
    asked = []

    async def note(question, truth, answer):
        asked.append((question, truth, answer))
        return False

    play(
        game(note), ["no", r"\boxed{}", r"\boxed{cut off, for the response is longer than sixty tokens}", r"\boxed{4}"]
    )
    assert asked == [("What is one half?", "1/2", "4")]


def test_an_unverified_rollout_is_on_record_and_in_no_group_that_is_learned_from():
    async def silent_on_three(question, truth, answer):
        return None if answer == "3" else answer == "1/2"

    task = game(silent_on_three)
    rollouts = play(task)
    groups = task.groups(rollouts, 3)
    assert [len(group.rollouts) for group in groups] == [3, 1] and [group.trained for group in groups] == [True, False]
    assert groups[1].rollouts[0].reject_reason == "unverified" and groups[1].advantages == (0.0,)
    # Rewards 1, 0, -0.5 of the others: their mean is not pulled down by a zero.
    assert sum(groups[0].advantages) == pytest.approx(0.0, abs=1e-6)
    found = task.health(groups)
    assert found["verifier/unverified_share"] == 0.25 and found["reward/prediction/mean"] == pytest.approx(0.5 / 3)


@pytest.mark.parametrize(("rule", "interval_is_right"), [("qwen", True), ("math_verify", False)])
def test_a_rule_verifies(rule, interval_is_right):
    verifier = RuleVerifier(VerifierConfig(verifier_rule=rule))
    assert asyncio.run(verifier("", "1/2", r"\frac{1}{2}")) is True
    assert asyncio.run(verifier("", "1/2", "2")) is False
    assert asyncio.run(verifier("", "(1,2)", "(1,2]")) is interval_is_right
    verifier._judge.close()


def test_a_dead_verifier_is_asked_again_and_then_the_rollout_is_left_out():
    tries = []
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections and hangs up
        listener.settimeout(10)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def hang_up():
            while len(tries) < 3:
                connection, _ = listener.accept()
                tries.append(1)
                connection.close()

        import threading

        thread = threading.Thread(target=hang_up)
        thread.start()
        settings = VerifierConfig(
            verifier="model", verifier_urls=url, verifier_tries=3, verifier_pause_s=0.01, verifier_name="v"
        )
        task = game(ModelVerifier(settings))
        rollouts = play(task, [r"\boxed{4}", "no", "no", "no"])
        thread.join()
    assert len(tries) == 3
    assert rollouts[0].reject_reason == "unverified"
    assert [len(group.rollouts) for group in task.groups(rollouts, 3)] == [3, 1]


def test_a_server_that_refuses_one_answer_leaves_it_out_and_one_that_refuses_all_is_an_error(monkeypatch):
    settings = VerifierConfig(verifier="model", verifier_urls="http://127.0.0.1:9", verifier_name="v")
    verifier = ModelVerifier(settings)
    refuses = {"long": True, "short": False}

    def complete(prompt, max_new_tokens, **params):
        if refuses["long" if "Student" in prompt else "short"]:
            raise ServerRefused("http://127.0.0.1:9", "/v1/completions", 400, "too long")
        return Told("", False, 1)

    monkeypatch.setattr(verifier._servers, "complete", complete)
    assert asyncio.run(verifier("q", "1", "2")) is None
    refuses["short"] = True
    with pytest.raises(ServerRefused, match="too long"):
        asyncio.run(verifier("q", "1", "2"))


def test_questions_are_read_as_webinstruct_verified_has_them(tmp_path):
    import pyarrow
    import pyarrow.parquet

    row = {
        "id": 7,
        "question": "How many?",
        "answer": "3",
        "answer_type": "Integer",
        "category": "Maths",
        "difficulty": "Easy",
    }
    (tmp_path / "q.jsonl").write_text(
        '{"question": "a", "answer": 2}\n\n{"question": "b", "answer": ""}\n', encoding="utf-8"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "r.parquet")
    with pytest.raises(CorpusError, match=r"q\.jsonl:2: no question or answer"):
        read_questions(tmp_path)
    found, counts = read_questions(tmp_path, skip_bad_lines=True)
    assert found == [Paragraph("q:1", "a", answer="2"), Paragraph("7", "How many?", "Maths", answer="3")]
    assert counts == {"read": 2, "no_question_or_answer": 1}


def test_templates_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "v.txt").write_text("{question} {answer}")
    with pytest.raises(TemplateError, match=r"v\.txt lacks \{truth\}"):
        load_template(str(tmp_path / "v.txt"))
    (tmp_path / "question.txt").write_text("nothing")
    with pytest.raises(TemplateError, match=r"question\.txt lacks its placeholder"):
        Rlvr(
            TaskConfig(task="rlvr", template_dir=str(tmp_path)),
            EngineConfig(),
            ByteTokenizer(),
            PLAIN,
            VerifierConfig(),
        )
