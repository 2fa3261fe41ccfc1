"""The evaluation tool and the model verifier with a real SGLang server."""

import asyncio
import json
import os
import re
import subprocess
import sys

import pytest
from demo_runs import ROOT, arguments, rows, write_text
from evaluate_samples import BBEH, MMLU_PRO, write_sets

from megatron_pz.config.schema import VerifierConfig
from megatron_pz.tasks.verifiers import ModelVerifier

POLICY = ROOT / "examples" / "demo_policy"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def place(launch, tmp_path_factory):
    """A server of the demo policy, with a folder for files."""
    served = launch(POLICY, **{"context-length": 512, "skip-tokenizer-init": False})  # it is sent text
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "key").write_text(served.api_key)
    yield served, folder
    served.process.stop(at_once=True)


def evaluate(*given):
    tool = [sys.executable, str(ROOT / "tools" / "evaluate.py")]
    done = subprocess.run(
        [*tool, *map(str, given)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def texts(out):
    return {(row["suite"], row["question"]): row["response"] for row in rows(out, "graded.jsonl")}


def common(folder):
    sets = write_sets(folder / "sets", mmlu_pro=MMLU_PRO, bbeh=BBEH)  # no mathematics: sympy loads for seconds
    return ["--suites", "mmlu_pro,bbeh", "--data", sets, "--max-new-tokens", 12]


def by_url(served, folder):
    """Folder of the evaluation by URL; made by the first that asks."""
    out = folder / "url"
    url = ["--url", served.url, "--api", "completions", "--api-key-file", folder / "key"]
    evaluate("--out", out, *common(folder), *url)
    return out


def test_a_language_model_is_asked_for_its_verdict(place):
    served, folder = place
    settings = VerifierConfig(
        verifier="model", verifier_urls=served.url, verifier_api_key_file=str(folder / "key"), verifier_max_tokens=8
    )
    # The demo policy knows no verdict line: that is a no. A question that does not fit its context has no verdict at all.
    assert asyncio.run(ModelVerifier(settings)("1 + 1?", "2", "2")) is False
    assert asyncio.run(ModelVerifier(settings)("word " * 2000, "2", "2")) is None


def test_a_server_like_openais_is_asked_once(place):
    served, folder = place
    out = by_url(served, folder)
    before = (out / "responses.jsonl").read_bytes()
    assert before.count(b"\n") == 4 and len(texts(out)) == 4
    assert by_url(served, folder) == out and (out / "responses.jsonl").read_bytes() == before


def test_one_model_answers_alike_by_url_by_servers_and_by_its_own_engine(place):
    served, folder = place
    flags = arguments(
        folder / "run", write_text(folder / "text.jsonl"), server_urls=served.url, api_key_file=folder / "key"
    )
    evaluate("--out", folder / "servers", *common(folder), "--config", flags[0], "--", *flags[1:])
    evaluate("--out", folder / "own", *common(folder), "--hf-model", POLICY, "--prompt-style", "plain")
    # Greedy in float32 on all sides: the same texts, but for this tokenizer's special tokens, which a server that decodes leaves out.
    own = texts(folder / "own")
    assert texts(folder / "servers") == own
    plain = {question: re.sub(r"\\(mask|boxed)\{|\}", "", text) for question, text in own.items()}
    assert texts(by_url(served, folder)) == plain
    scores = [
        json.loads((folder / way / "evaluation.json").read_text())["models"][0]["suites"] for way in ("servers", "own")
    ]
    for suite in ("mmlu_pro", "bbeh"):
        assert scores[0][suite]["scores"] == scores[1][suite]["scores"]
