"""Tiny test sets of our own in the published formats, for tests of reading and of whole evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

MMLU_PRO: Rows = [
    {
        "question_id": 70,
        "question": "Which of these is a prime number?",
        "options": ["4", "9", "11", "15", "21"],
        "answer": "C",
        "answer_index": 2,
        "cot_content": "",
        "category": "math",
        "src": "ours",
    },
    {
        "question_id": 71,
        "question": "Which gas do plants take in for photosynthesis?",
        "options": ["oxygen", "carbon dioxide", "N/A", "helium"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": "",
        "category": "biology",
        "src": "ours",
    },
]
SUPERGPQA: Rows = [
    {
        "uuid": "0a1b",
        "question": "A body in free fall for 2 s (g = 10 m/s^2) has fallen",
        "options": ["10 m", "20 m", "40 m", "5 m"],
        "answer": "20 m",
        "answer_letter": "B",
        "discipline": "Science",
        "field": "Physics",
        "subfield": "Mechanics",
        "difficulty": "easy",
        "is_calculation": True,
    }
]
BBEH: Rows = [
    {"task": "boolean expressions", "input": "not ( False ) and True is", "target": "True", "mini": 1},
    {"task": "word sorting", "input": "Sort: pear apple", "target": "apple, pear", "mini": 0},
]
BBEH_TASK = {"canary": "ours", "examples": [{"input": "Is 3 odd?", "target": "(A)"}]}
MATH500: Rows = [
    {
        "problem": "Compute $\\frac{1}{3}+\\frac{1}{6}$.",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
        "answer": "\\frac{1}{2}",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": "test/prealgebra/1.json",
    }
]
MATH: Rows = [
    {"problem": "Solve x+1=3.", "level": "Level 1", "type": "Algebra", "solution": "So $x=\\boxed{2}$."},
]
OLYMPIAD: Rows = [
    {
        "id": 1606,
        "subfield": "Algebra",
        "context": None,
        "question": "Find the sum of the roots of $x^2-5x+6=0$.",
        "solution": ["By Vieta it is 5."],
        "final_answer": ["$5$"],
        "is_multiple_answer": False,
        "unit": None,
        "answer_type": "Numerical",
    }
]
MINERVA: Rows = [
    {"problem": "Give the wavelength in cm.", "solution": "It is \\boxed{1.5e-3}.", "type": "Physics", "idx": 0}
]
GSM8K: Rows = [
    {"question": "Ann has 3 bags of 400 nuts. How many nuts?", "answer": "3*400=<<3*400=1200>>1200 nuts.\n#### 1,200"},
    {"question": "Tom had 5 pens and lost 2. How many are left?", "answer": "5-2=<<5-2=3>>3\n#### 3"},
]
AMC23: Rows = [{"id": 0, "answer": 27.0, "url": "ours", "question": "What is 3 to the third power?"}]
AIME24: Rows = [
    {"id": 60, "problem": "What is 17 times 12?", "solution": "", "answer": "204", "url": "ours", "year": "2024"}
]

SETS: dict[str, Rows] = {
    "mmlu_pro": MMLU_PRO,
    "supergpqa": SUPERGPQA,
    "bbeh": BBEH,
    "math500": MATH500,
    "olympiad": OLYMPIAD,
    "minerva": MINERVA,
    "gsm8k": GSM8K,
    "amc23": AMC23,
    "aime24": AIME24,
    "math": MATH,
}


def write_sets(folder: Path, **sets: Rows) -> Path:
    """`folder` with `<suite>.jsonl` of each; all of them unless some are given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (sets or SETS).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
