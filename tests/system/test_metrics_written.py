"""Every metric of the table is written by a run; those that need a setting say so in the table."""

import json
import sys

import pytest
from demo_runs import TEXT, rows, run, write_text
from metric_ranges import out_of_range

from megatron_pz.report.metrics import METRICS, WHEN


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    return folder, write_text(folder / "text.jsonl"), write_text(folder / "held_out.jsonl", TEXT[:2])


@pytest.fixture(scope="module")
def plain(places):
    """A run of the game as it is set by default, that scores nothing and holds nothing out."""
    folder, corpus, _ = places
    assert run(folder / "plain", corpus, train_iters=4, paragraphs_per_step=3) == 0
    return rows(folder / "plain")


@pytest.fixture(scope="module")
def rich(places):
    """The game with everything on."""
    folder, corpus, held_out = places
    flags = {"held_out_path": held_out, "eval_interval": 1, "save_interval": 2, "kl_coef": 0.01, "train_iters": 3}
    flags |= {"importance_sampling": "truncated", "probe_shuffled": True}
    assert run(folder / "rich", corpus, **flags, paragraphs_per_step=3) == 0
    return rows(folder / "rich")


@pytest.fixture(scope="module")
def text(places):
    folder, corpus, _ = places
    assert run(folder / "text", corpus, task="continue_pt", train_iters=2) == 0
    return rows(folder / "text")


ELSEWHERE = {
    name for name, condition in WHEN.items() if "sglang" in condition or condition in ("task rlvr", "on a GPU")
}
"""Written where servers generate (tests/sglang has runs with them), answers are verified (test_rlvr_run.py), or a GPU is."""


def names(found):
    return {name for row in found for name, value in row.items() if value is not None}


def conditional():
    """Names of the rows in `WHEN`, places filled in."""
    return {
        name
        for name in METRICS
        if name in WHEN
        or any(name == row.replace("<set>", held) for row in WHEN for held in ("fixed_masks", "held_out", "shuffled"))
    }


def test_a_plain_run_writes_all_but_what_the_table_makes_conditional(plain):
    assert set(METRICS) - names(plain) == conditional()


def test_what_is_conditional_is_written_where_its_condition_holds(rich, text):
    assert conditional() - ELSEWHERE <= names(rich) | names(text)
    assert conditional() - ELSEWHERE - names(rich) == {"entropy"}


def test_every_value_is_within_its_range(plain, rich, text):
    for row in (*plain, *rich, *text):
        assert out_of_range(row) == []


def test_epochs_and_tokens_are_counted_as_they_are(plain, places):
    # 4 texts, 3 drawn a step
    assert [(row["epoch"], row["num_paragraphs"]) for row in plain] == [(0.0, 3), (0.75, 3), (1.5, 3), (2.25, 3)]
    written = rows(places[0] / "plain", "rollouts.jsonl")
    for row in plain:
        assert row["tokens/generated"] == sum(r["num_tokens"] for r in written if r["step"] == row["step"])


def test_weights_and_biases_is_told_the_settings(places, tmp_path, monkeypatch):
    """A module of that name writes down how it was called; a run's own calls reach it."""
    (tmp_path / "wandb.py").write_text(
        "import json, pathlib\n"
        "LOG = pathlib.Path(__file__).with_name('calls.jsonl')\n"
        "class Run:\n"
        "    id = 'abc'\n"
        "    def log(self, values, step): LOG.open('a').write(json.dumps(['log', step, sorted(values)]) + '\\n')\n"
        "    def finish(self): pass\n"
        "def init(**given):\n"
        "    LOG.open('a').write(json.dumps(['init', given['project'], given['config']]) + '\\n')\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert run(tmp_path / "run", places[1], task="continue_pt", train_iters=1, wandb_project="zero") == 0
    monkeypatch.delitem(sys.modules, "wandb")
    (_, project, config), (_, step, values) = [json.loads(line) for line in (tmp_path / "calls.jsonl").open()]
    assert (project, step) == ("zero", 1)
    assert config["train"]["train_iters"] == 1 and config["task"]["task"] == "continue_pt"
    assert "loss" in values
