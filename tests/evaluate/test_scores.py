"""Scores, intervals and the paper's averages, by hand."""

import pytest

from megatron_pz.evaluate.grading import Graded, grade_choice, grade_math
from megatron_pz.evaluate.intervals import average, estimate
from megatron_pz.evaluate.responses import Response
from megatron_pz.evaluate.results import Examined, curves, table, to_json
from megatron_pz.evaluate.score import averages, score_suite
from megatron_pz.evaluate.suites.formats import Question
from megatron_pz.evaluate.suites.table import GENERAL, HEADLINE, MATH, SUITES
from megatron_pz.grade.judge import Judge


def scored(name, means):
    """A suite whose questions have these headline scores (0 or 1)."""
    suite = SUITES[name]
    questions = [Question(str(i), "?", "A", ("x", "y")) for i in range(len(means))]
    graded = [[Graded("A", True, {HEADLINE[suite.kind]: float(mean)})] for mean in means]
    return score_suite(suite, questions, graded, [[Response("", False, 4)]] * len(means))


def test_one_answer_a_question_has_wilsons_interval():
    found = estimate([[1.0]] * 7 + [[0.0]] * 3, "x")
    # z = 1.96, n = 10: centre (0.7 + 0.19208) / 1.38416 = 0.64449, half 0.24776
    assert found.mean == 0.7 and found.method == "wilson"
    assert (found.low, found.high) == pytest.approx((0.39678, 0.89221), abs=1e-4)


def test_the_interval_of_several_answers_is_over_questions_not_over_answers():
    # Two questions, always and never right: 64 answers say no more than two.
    found = estimate([[1.0] * 32, [0.0] * 32], "x")
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.method == "bootstrap over questions"
    same = estimate([[1.0, 0.0]] * 10, "x")
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)  # no question differs from another
    assert estimate([[1.0, 0.0], [1.0, 1.0]], "x") == estimate([[1.0, 0.0], [1.0, 1.0]], "x")


def test_an_average_has_the_plain_mean_of_its_suites_whatever_their_sizes():
    assert average([("a", [1.0] * 99), ("b", [0.0])]).mean == 0.5


def test_the_papers_averages():
    # Table 1 and 2, Qwen3-4B-Base in structure: math counts once in the overall mean.
    shares = {
        "supergpqa": 1,
        "bbeh": 0,
        "mmlu_pro": 2,
        "math500": 4,
        "olympiad": 2,
        "minerva": 0,
        "gsm8k": 4,
        "amc23": 1,
        "aime24": 1,
    }
    scores = {name: scored(name, [1] * count + [0] * (4 - count)) for name, count in shares.items()}
    found = averages(scores)
    assert found["math_average"].mean == pytest.approx((1 + 0.5 + 0 + 1 + 0.25 + 0.25) / 6)
    assert found["general_average"].mean == pytest.approx((0.25 + 0 + 0.5) / 3)
    assert found["overall"].mean == pytest.approx((0.5 + 0.25 + 0 + 0.5) / 4)
    assert found["overall"].low < found["overall"].mean < found["overall"].high


def test_an_average_that_lacks_a_suite_is_not_given():
    scores = {name: scored(name, [1]) for name in MATH}
    assert set(averages(scores)) == {"math_average"}
    assert set(averages({name: scored(name, [1]) for name in GENERAL})) == {"general_average"}


def test_a_failed_extraction_is_counted_and_its_guess_stands_apart():
    question = Question("1", "?", "B", ("a", "b", "c", "d"))
    with Judge() as judge:
        told = [r"\boxed{(B)}", "I cannot say", r"\boxed{A or B}", "The answer is (A)."]
        graded = [grade_choice(question, text, judge) for text in told]
    score = score_suite(SUITES["mmlu_pro"], [question] * 4, [[one] for one in graded], [[Response("", False, 1)]] * 4)
    assert score.main.mean == 0.25 and score.not_found_share == 0.5
    assert score.guessed == (1 + 0.25 + 0.25 + 0) / 4
    assert score.scores["lenient"].mean == 0.25  # "A or B": the first of the alphabet, A
    assert [one.scores["mmlu_pro"] for one in graded] == [1, 0, 1, 0]  # "I" of "I cannot" is a lone capital


def test_mathematics_is_graded_both_ways():
    with Judge(20.0) as judge:
        graded = grade_math(Question("1", "?", "(1,2)"), r"so it is $\boxed{(1,2]}$", judge)
        number = grade_math(Question("1", "?", "7"), "3 + 4 makes 7", judge)
        nothing = grade_math(Question("1", "?", "7"), "", judge)
    assert graded.scores == {"qwen": 1.0, "math_verify": 0.0} and graded.is_found
    assert number.scores["qwen"] == 1.0 and not number.is_found
    assert set(nothing.scores.values()) == {0.0}


def test_results_are_told_in_json_a_table_and_curves():
    one = Examined("step_2", "w2", 2, {"gsm8k": scored("gsm8k", [1, 0])})
    two = Examined("step_10", "w10", 10, {"gsm8k": scored("gsm8k", [1, 1])})
    found = to_json([one, two], {"seed": "1"})
    assert [model["suites"]["gsm8k"]["scores"]["qwen"]["mean"] for model in found["models"]] == [0.5, 1.0]
    assert "| gsm8k | qwen | 50.00 [9.45, 90.55] | 100.00 [34.24, 100.00] |" in table([one, two])
    drawn = curves([two, one])
    assert drawn.count("<polyline") == 1 and "step 2<" in drawn and "step 10<" in drawn
