"""Hard answers: what Qwen's semantics and math-verify say of them, and that no formula holds the judge up."""

import time

import pytest

from megatron_pz.grade.clean import clean
from megatron_pz.grade.judge import Judge, Verdict


@pytest.fixture(scope="module")
def judge():
    with Judge(time_limit_s=20.0) as made:
        yield made


# (answer, target, right by Qwen's semantics, right by math-verify)
CASES = [
    (r"\frac{3}{6}", r"\frac12", 1, 1),
    (r"\dfrac{1}{2}", "0.5", 1, 1),
    (r"1\frac{1}{2}", r"\frac{3}{2}", 1, 1),  # a mixed number
    (r"1 \frac{3}{4}", "1.75", 1, 1),
    ("1/3", r"\frac{1}{3}", 1, 1),
    ("0.333", r"\frac{1}{3}", 0, 0),  # one part in ten thousand is the limit
    ("1,234", "1234", 1, 1),
    (r"1{,}000", "1000", 1, 1),
    ("3.0", "3", 1, 1),
    ("50%", "0.5", 1, 1),
    (r"50\%", "50", 1, 1),
    ("5", "50", 0, 0),
    (r"12\text{ cm}", "12", 1, 1),
    (r"90^\circ", "90", 1, 1),
    (r"\$15.00", "15", 1, 1),
    ("two", "2", 1, 0),  # a number in words
    (r"\text{Monday}", "Monday", 1, 1),
    ("monday", "Monday", 1, 1),
    ("7.", "7", 1, 0),
    ("x=3", "3", 1, 1),
    ("(1,2)", "(2,1)", 0, 0),
    ("(1, 4.5)", r"(1,\frac{9}{2})", 1, 1),
    ("(1,2]", "(1,2)", 1, 0),  # Qwen's grader does not look at the brackets of an interval
    (r"x\in[1,2]", "[1,2]", 1, 1),
    (r"(-\infty,\infty)", r"\mathbb{R}", 1, 1),
    (r"\{3,1,2\}", r"\{1,2,3\}", 0, 1),  # nor does it know that a set has no order
    (r"\{1,\frac12\}", r"\{1,0.5\}", 1, 1),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 1, 1),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", 0, 0),
    (r"\sqrt{8}", r"2\sqrt2", 1, 1),
    ("sqrt(2)/2", r"\frac{\sqrt2}{2}", 1, 1),
    ("x^2+2x+1", "(x+1)^2", 1, 1),
    (r"\sec^2(y)", r"\tan^2(y)+1", 1, 1),
    (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}", 1, 1),
    ("m+n", "n+m", 1, 1),  # letters that are also units
    (r"6\times10^3", "6000", 1, 1),
    (r"\pi", "3.14", 0, 0),
    ("C", "(C)", 1, 1),
    (r"\text{No solution}", r"\emptyset", 0, 0),
    ("((((((((", "1", 0, 0),
    ("", "1", 0, 0),
]


@pytest.mark.parametrize(("answer", "target", "qwen", "math_verify"), CASES)
def test_hard_answers(judge, answer, target, qwen, math_verify):
    found = judge("qwen", answer, target), judge("math_verify", f"\\boxed{{{answer}}}", target)
    assert (found[0].right, found[1].right) == (bool(qwen), bool(math_verify)), found
    assert found[0].fault is None and found[1].fault is None


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        (r"\left( 1, 2 \right)", "(1,2)"),
        ("5 m/s", "5"),
        ("12 square feet", "12"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac{1}2", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        ("k = 9", "9"),
        (".5", "0.5"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("two hundred and ten", "210"),
        ("miles", "miles"),
        ("a + b", "a+b"),
    ],
)
def test_cleaning(answer, cleaned):
    assert clean(answer) == cleaned


def test_a_formula_that_cannot_be_worked_out_is_given_up_in_time():
    # A power tower: one instruction of C that no alarm would interrupt.
    with Judge(time_limit_s=1.0) as short:
        short("qwen", "1+x", "x+1")  # loads sympy
        begun = time.monotonic()
        assert short("qwen", "9^{9^{9^{9}}}", "3") == Verdict(False, "timeout")
        assert time.monotonic() - begun < 60
        assert short("qwen", "\\sqrt{16}+y", "y+4").right  # and the next is answered by another process


def test_what_is_equal_as_text_needs_no_process():
    alone = Judge(time_limit_s=0.0)
    assert alone("qwen", r"\boxed".replace("boxed", "dfrac12"), r"\frac{1}{2}").right
    assert alone._workers[0]._process is None


def test_a_response_is_never_run_as_python(judge, tmp_path):
    trap = f"__import__('pathlib').Path('{tmp_path}/ran').touch()"
    for rule in ("qwen", "math_verify"):
        assert not judge(rule, trap, "1").right
    assert not (tmp_path / "ran").exists()
