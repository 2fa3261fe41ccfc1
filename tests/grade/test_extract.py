"""Where a response gives its answer."""

import pytest

from megatron_pz.grade.bbeh import extract_bbeh, matches_bbeh
from megatron_pz.grade.choices import lenient_letter, mmlu_pro_letter, strict_letter
from megatron_pz.grade.extract import Extracted, extract_math


@pytest.mark.parametrize(
    ("response", "answer", "is_announced"),
    [
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{x \in \{1, 2\}}", r"x \in \{1, 2\}", True),
        (r"$\boxed 5$ is it", "5", True),
        (r"so \boxed{12", "12", True),  # cut off
        ("\\boxed{1 +\n 2}.", "1 +2", True),
        ("The answer is: $7$.", "$7$", True),
        ("My final answer is 1,000.\n\nI hope so.", "1,000", True),
        ("答案是42", "42", True),
        ("I count 3, then 1,250 of them", "1250", False),
        ("a loss of -4.5", "-4.5", False),
        ("none", "", False),
        ("", "", False),
    ],
)
def test_mathematics(response, answer, is_announced):
    assert extract_math(response) == Extracted(answer, is_announced)


@pytest.mark.parametrize(
    ("response", "strict", "official", "lenient"),
    [
        (r"\boxed{C}", "C", "C", "C"),
        (r"\boxed{(C)}.", "C", "C", "C"),
        (r"\boxed{\text{(C)}}", "C", "C", "C"),
        (r"\boxed{$C$}", "C", "C", "C"),
        (r"first \boxed{A}, then \boxed{D}", "D", "D", "D"),
        (r"\boxed{C: the Dane}", None, "C", "C"),
        (r"\boxed{the Dane}", None, None, "D"),  # a letter inside a word
        (r"\boxed{K}", None, None, None),
        ("the answer is (B)", "B", "B", None),
        ("**Final Answer:** E", "E", "E", "E"),
        ("Answer: F", "F", "F", None),
        ("The answer is Denmark", None, "D", None),  # known of MMLU-Pro's harness, and kept under its name
        ("nothing", None, None, None),
        ("", None, None, None),
    ],
)
def test_a_choice_by_each_rule(response, strict, official, lenient):
    assert strict_letter(response) == strict
    assert mmlu_pro_letter(response) == official
    assert lenient_letter(response) == lenient


@pytest.mark.parametrize(
    ("response", "target", "right"),
    [
        (r"\boxed{True}", "True", True),
        (r"\boxed{(b)}", "(B)", True),
        (r"\boxed{B}", "(B)", True),
        (r"\boxed{b, c}", "b,c", True),
        (r"\boxed{\texttt{3.0}}", "3", True),
        ("The final answer is: '**yes**'.", "yes", True),
        ("the answer is unknown?", "unknown", True),
        (r"\boxed{[1, 2]}", "1, 2", True),
        (r"\boxed{C}", "(B)", False),
        ("I say yes", "yes", False),  # nothing is announced
        (r"\boxed{}", "yes", False),
    ],
)
def test_bbeh(response, target, right):
    assert matches_bbeh(extract_bbeh(response), target) is right
