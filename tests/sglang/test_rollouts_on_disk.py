"""What a real server sampled is on disk token for token, and is read back and not asked for again: in tools/play.py, and
in a run whose trainer was killed in the middle of a step."""

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
from demo_runs import ROOT, TEXT, arguments, rows, write_text
from programs import tool

from megatron_pz.checkpoint.completion_lines import completions, read_lines
from megatron_pz.checkpoint.journal import CompletionJournal
from megatron_pz.corpus.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow  # minutes; tests/sglang has shorter ones of the same parts


@pytest.fixture(scope="module")
def flags(server, tmp_path_factory):
    """The command line of a game with `server`; a tokenizer of its vocabulary beside it."""
    folder = tmp_path_factory.mktemp("play")
    make = tool("make_demo_policy")
    make.write_blank(folder / "tokenizer", TEXT, make.CONFIG | {"vocab_size": 400})
    (folder / "key").write_text(server.api_key)
    given = {
        "engine": "sglang",
        "hf_model": server.model_path,
        "tokenizer": folder / "tokenizer",
        "server_urls": server.url,
        "api_key_file": folder / "key",
        "task": "random_span",
        "n_masks_per_paragraph": 2,
        "max_paragraph_tokens": 150,
        "max_prompt_tokens": 200,
        "max_response_tokens": 12,
        "train_iters": 2,
    }
    corpus = write_text(folder / "text.jsonl")
    return lambda run_dir, **more: arguments(run_dir, corpus, **{**given, **more})


def answers(run_dir, step):
    """Completions on disk."""
    return completions(read_lines(CompletionJournal(run_dir / "journal").path(step)))


def test_a_game_is_written_down_and_goes_on_where_it_was(flags, tmp_path, capsys):
    play, command = tool("play"), flags(tmp_path)
    assert play.main(command) == 0, capsys.readouterr().err
    first = capsys.readouterr().out.splitlines()
    written = rows(tmp_path, "rollouts.jsonl")
    assert len(written) == 2 * 2 * 2 * 4  # rounds, paragraphs, masks, predictions
    assert first[0] == "round 1: 16 responses generated, 0 read back"
    decode = load_tokenizer(command[command.index("--tokenizer") + 1]).decode
    for step in (1, 2):
        said = sorted(row["response"] for row in written if row["step"] == step)
        assert sorted(decode(found.completion.token_ids) for found in answers(tmp_path, step)) == said
        assert all(-math.inf < p <= 0 for found in answers(tmp_path, step) for p in found.completion.logprobs)
    file = CompletionJournal(tmp_path / "journal").path(2)
    file.write_bytes(file.read_bytes()[:-40])  # killed while the last was written
    assert play.main(command) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.splitlines() == [
        "round 1: 0 responses generated, 16 read back",
        "round 2: 1 responses generated, 15 read back",
    ]
    again = rows(tmp_path, "rollouts.jsonl")
    differ = [a for a, b in zip(written, again, strict=True) if a != b]
    assert len(differ) <= 1  # the one that was torn, sampled anew


def test_a_wrong_key_is_told(server, flags, tmp_path, capsys):
    (tmp_path / "key").write_text("another")
    assert tool("play").main(flags(tmp_path / "run", api_key_file=tmp_path / "key")) == 2
    assert (
        f"{server.url} refuses the key (HTTP 401). Name the servers' key by --api-key-file" in capsys.readouterr().err
    )


def test_a_trainer_killed_in_the_middle_of_a_step_asks_for_nothing_that_it_has(server, flags, tmp_path, capsys):
    run_dir, num_requests = tmp_path / "run", 16
    slow = {"max_running_requests": 2, "max_response_tokens": 100, "save_interval": 1}
    command = [sys.executable, "-W", "ignore", "-m", "megatron_pz", *flags(run_dir, **slow)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        with (tmp_path / "log").open("wb") as log:
            trainer = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
            while len(answers(run_dir, 2)) < 5:
                assert trainer.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.02)
            trainer.kill()
            trainer.wait()
        before = answers(run_dir, 2)
        assert 5 <= len(before) < num_requests
        assert not CompletionJournal(run_dir / "journal").path(1).exists()  # the checkpoint has made it useless
        assert [row["step"] for row in rows(run_dir)] == [1]

        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    finally:
        server.restore()
    after = answers(run_dir, 2)
    assert after[: len(before)] == before
    assert Counter(found.key for found in after).most_common(1)[0][1] == 1 and len(after) == num_requests
    assert [row["step"] for row in rows(run_dir)] == [1, 2]
    played = [row for row in rows(run_dir, "rollouts.jsonl") if row["step"] == 2]
    decode = load_tokenizer(command[command.index("--tokenizer") + 1]).decode
    assert sorted(row["response"] for row in played) == sorted(decode(found.completion.token_ids) for found in after)
    assert {row["weight_version"] for row in played} == {0}  # nothing was learned from a policy that is never right

    # The round can be told again without the server, and teaches what it taught.
    assert tool("replay_step").main([str(run_dir), "2", "--checkpoint", "1"]) == 0, capsys.readouterr().err
    told, wrote = json.loads(capsys.readouterr().out), rows(run_dir)[-1]
    assert told.keys() >= {"step", "reward/prediction/mean", "tokens/completion"}
    assert told == {name: wrote[name] for name in told}
