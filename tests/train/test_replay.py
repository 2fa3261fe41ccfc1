"""Rounds told again from their records, and what the policy learns from them without an engine."""

import asyncio
import json
import random
from dataclasses import replace

import programs
import pytest
from builders import TableEngine
from demo_runs import arguments, tiny_policy, write_text
from safetensors.numpy import load_file

from megatron_pz.checkpoint.journal import JOURNAL_FOLDER, CompletionJournal
from megatron_pz.checkpoint.saved_rounds import saved_rollouts
from megatron_pz.config.load import load_config, to_toml
from megatron_pz.corpus.cursor import Cursor
from megatron_pz.corpus.reader import read_paragraphs
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.errors import CheckpointError
from megatron_pz.game.prompts import Templates
from megatron_pz.tasks.registry import make_task
from megatron_pz.tasks.stragglers import Stragglers, num_begun

PER_STEP = 2


@pytest.fixture(scope="module")
def replay():
    """The tool's `main`."""
    return programs.tool("replay_step").main


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("policy") / "policy")


def play(folder, policy, how="wait", steps=(1, 2), weights="", notes=True, **flags):
    """A folder as a run or tools/play.py leaves it, played with answers from a table; the rollouts of its rounds."""
    if how != "wait":
        flags |= {"engine": "sglang", "stragglers": how, "over_sampling": 0.5}
    folder.mkdir()
    corpus = write_text(folder / "text.jsonl")
    config = load_config(arguments(folder, corpus, hf_model=policy, init="random", **flags))
    paragraphs, _ = read_paragraphs(corpus, skip_bad_lines=False)
    if notes:
        corpus.unlink()
    (folder / "config.toml").write_text(to_toml(config))
    tokenizer = load_tokenizer(policy)
    task = make_task(config.task, config.engine, tokenizer, Templates.load(config.task.template_dir, "plain"))

    def reply(prompt, params):
        rng = random.Random(params.seed)
        return rf"\{'mask' if '<gen>' in prompt else 'boxed'}{{ {rng.choice(['is', 'of'])}}}"

    class Ids:
        """The tokenizer as `TableEngine` wants it."""

        EOS, encode, decode = tokenizer.eos_token_ids[0], tokenizer.encode, tokenizer.decode

    engine = TableEngine(reply, Ids(), order=random.Random(5))
    journal = CompletionJournal(folder / JOURNAL_FOLDER)

    async def rounds():
        stragglers = Stragglers(
            task,
            config.engine,
            PER_STEP,
            config.train.seed,
            record=lambda s, taken: journal.note_taken(s, taken, weights),
        )
        found, position = {}, 0
        for step in steps:
            count = num_begun(config.engine, PER_STEP, step)
            texts = [paragraphs[place] for place in Cursor(len(paragraphs), config.train.seed).take(position, count)]
            position += count
            if notes:
                journal.note_begun(step, config.train.seed, texts)
            found[step] = (await stragglers.play(step, texts, journal.keep(engine, step, weights=weights))).rollouts
        await stragglers.close()
        return found

    found = asyncio.run(rounds())
    journal.close()
    return journal, task, found


def unasked(step):
    raise AssertionError("the records say what the round began")


@pytest.mark.parametrize("how", ["wait", "cut", "continue"])
@pytest.mark.parametrize("task", ["pretrain_zero", "random_span"])
def test_a_saved_round_is_told_as_it_was(tmp_path, policy, how, task):
    journal, task, played = play(tmp_path / "run", policy, how, steps=(1, 2, 3), weights="aa", task=task)
    for step, rollouts in played.items():
        assert saved_rollouts(journal, step, task, unasked) == rollouts
        assert (
            len({r.group_id.rsplit(".", 1)[0] if r.group_id.count(".") > 1 else r.group_id for r in rollouts})
            == PER_STEP
        )


def test_a_round_that_is_not_there_or_not_complete_is_refused(tmp_path, policy):
    journal, task, _ = play(tmp_path / "run", policy)
    with pytest.raises(
        CheckpointError, match=r"step_000007.jsonl holds no round. It has step_000001.jsonl, step_000002"
    ):
        saved_rollouts(journal, 7, task, unasked)
    lines = journal.path(2).read_text().splitlines(keepends=True)
    journal.path(2).write_text("".join(lines[:-1]))
    with pytest.raises(CheckpointError, match=r"not one that its round asks for: the round was not played to its end"):
        saved_rollouts(journal, 2, task, unasked)
    task.asker.engine = replace(task.asker.engine, temperature=0.5)
    with pytest.raises(CheckpointError, match="or with other settings"):
        saved_rollouts(journal, 1, task, unasked)


def test_the_tool_trains_on_saved_rounds_and_exports(tmp_path, policy, replay, capsys):
    _, task, played = play(tmp_path / "run", policy)
    assert replay([str(tmp_path / "run"), "1-2", "--export", str(tmp_path / "hf"), "--lr", "1e-3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        groups = task.groups(played[row["step"]], row["step"])
        assert row["reward/mask/mean"] == pytest.approx(task.health(groups)["reward/mask/mean"])
        trained = sum(len(r.completion.token_ids) for g in groups if g.trained for r in g.rollouts)
        assert row["tokens/trained"] == trained and row["grad_norm"] > 0
    assert rows[0]["lr"] == pytest.approx(1e-3)
    # The second update begins where the first has ended, and what was exported is what was learned.
    assert replay([str(tmp_path / "run"), "2", "--export", str(tmp_path / "second"), "--lr", "1e-3"]) == 0
    [alone] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert alone["loss"] != rows[1]["loss"]
    both, second = (
        load_file(tmp_path / "hf" / "model.safetensors"),
        load_file(tmp_path / "second" / "model.safetensors"),
    )
    assert set(both) == set(second) and any((both[name] != second[name]).any() for name in both)
    # From the export on, the same round has the log-probs of a policy that has learned it.
    again = ["--hf-model", str(tmp_path / "hf"), "--init", "pretrained", "--lr", "1e-3"]
    assert replay([str(tmp_path / "run"), "2", *again]) == 0
    assert json.loads(capsys.readouterr().out)["mismatch_kl"] != alone["mismatch_kl"]


def test_what_the_tool_cannot_do_is_told(tmp_path, policy, replay, capsys):
    play(tmp_path / "run", policy, steps=(1,))
    assert replay([str(tmp_path / "run"), "2"]) == 2
    assert "CheckpointError: " in (said := capsys.readouterr().err) and "holds no round" in said
    assert replay([str(tmp_path / "run"), "1", "--checkpoint", "5"]) == 2
    assert "has no checkpoint of step 5. It has: none" in capsys.readouterr().err
    assert replay([str(tmp_path / "run"), "1", "--lrr", "5"]) == 2
    assert "ConfigError: " in capsys.readouterr().err
    assert replay([str(tmp_path / "run"), "1", "--task", "sft"]) == 2
    assert "generates nothing that could be saved" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["wait", "continue"])
def test_a_round_whose_records_hold_no_texts_is_told_with_those_of_the_corpus(tmp_path, policy, replay, capsys, how):
    play(tmp_path / "noted", policy, how, steps=(1, 2, 3))
    play(tmp_path / "bare", policy, how, steps=(1, 2, 3), notes=False)
    told = {}
    for name in ("noted", "bare"):
        assert replay([str(tmp_path / name), "1-3"]) == 0
        told[name] = capsys.readouterr().out
    assert told["noted"] == told["bare"] and '"loss"' in told["bare"]
