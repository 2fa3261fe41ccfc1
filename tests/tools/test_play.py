"""The game without a trainer: what tools/play.py writes, goes on from, and does without."""

import asyncio
import json
import random
import subprocess
import sys

import programs
import pytest
from builders import TableEngine
from demo_runs import ROOT, arguments, rows, tiny_policy, write_text
from metric_ranges import out_of_range

from megatron_pz.checkpoint.completion_lines import completions, read_lines
from megatron_pz.config.load import load_config, read_config
from megatron_pz.corpus.reader import read_paragraphs
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.errors import EngineError
from megatron_pz.game.prompts import Templates
from megatron_pz.tasks.registry import make_task

NUM_ROUNDS = 3


@pytest.fixture(scope="module")
def tool():
    return programs.tool("play")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("play")
    return tiny_policy(folder / "policy"), write_text(folder / "text.jsonl")


class Engine(TableEngine):
    """Words that stand in the texts; breaks off after `breaks_at` answers."""

    def __init__(self, tokenizer, breaks_at=None):
        class Ids:
            EOS, encode, decode = tokenizer.eos_token_ids[0], tokenizer.encode, tokenizer.decode

        super().__init__(self.answer, Ids(), order=random.Random(1))
        self.breaks_at = breaks_at

    def answer(self, prompt, params):
        if self.breaks_at is not None and len(self.requests) > self.breaks_at:
            raise EngineError("the server went away")
        return rf"\{'mask' if '<gen>' in prompt else 'boxed'}{{ {random.Random(params.seed).choice(['is', 'of'])}}}"


def play(tool, places, run_dir, engine, weights="policy version 0", **flags):
    policy, corpus = places
    config = load_config(arguments(run_dir, corpus, hf_model=policy, train_iters=NUM_ROUNDS, **flags))
    tokenizer = load_tokenizer(policy)
    task = make_task(config.task, config.engine, tokenizer, Templates.load(config.task.template_dir, "plain"))
    paragraphs, _ = read_paragraphs(corpus, skip_bad_lines=False)
    run_dir.mkdir(exist_ok=True)
    asyncio.run(tool.play(config, task, paragraphs, engine, weights))
    return config


def recorded(run_dir):
    return [r for file in sorted((run_dir / "journal").iterdir()) for r in completions(read_lines(file))]


def test_rounds_are_written_as_a_run_writes_them_and_all_tokens_stand_in_the_journal(tool, places, tmp_path):
    engine = Engine(load_tokenizer(places[0]))
    config = play(tool, places, tmp_path, engine)
    assert read_config(tmp_path / "config.toml") == config
    written = rows(tmp_path, "rollouts.jsonl")
    assert {row["step"] for row in written} == {1, 2, 3} and len(written) == len(engine.requests)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    for row in rows(tmp_path):
        assert out_of_range(row) == [] and row["num_paragraphs"] == 2
    ids = sorted(tuple(r.completion.token_ids) for r in recorded(tmp_path))
    decode = load_tokenizer(places[0]).decode
    assert sorted(decode(i) for i in ids) == sorted(row["response"] for row in written)
    assert sum(len(i) for i in ids) == sum(row["num_tokens"] for row in written)


@pytest.mark.parametrize("how", ["wait", "cut", "continue"])
def test_a_game_that_broke_off_goes_on_and_asks_nothing_twice(tool, places, tmp_path, how):
    flags = {"stragglers": how, "over_sampling": 0.0 if how == "wait" else 0.5}
    tokenizer = load_tokenizer(places[0])
    with pytest.raises(EngineError):
        play(tool, places, tmp_path, Engine(tokenizer, breaks_at=60), **flags)
    first = {recorded_.key for recorded_ in recorded(tmp_path)}
    before = rows(tmp_path, "rollouts.jsonl")
    again = Engine(tokenizer)
    play(tool, places, tmp_path, again, **flags)
    assert 0 < len(before) and rows(tmp_path, "rollouts.jsonl")[: len(before)] == before
    keys = [recorded_.key for recorded_ in recorded(tmp_path)]
    assert len(set(keys)) == len(keys) and first <= set(keys)  # none was asked for again
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    third = Engine(tokenizer)
    play(tool, places, tmp_path, third, **flags)
    if how == "wait":
        assert third.requests == []


def test_other_weights_are_asked_anew(tool, places, tmp_path):
    tokenizer = load_tokenizer(places[0])
    first, second = Engine(tokenizer), Engine(tokenizer)
    play(tool, places, tmp_path, first)
    play(tool, places, tmp_path, second, weights="policy version 1")
    assert len(second.requests) == len(first.requests)


def test_it_runs_where_there_is_neither_torch_nor_megatron(places, tmp_path):
    policy, corpus = places
    flags = arguments(tmp_path / "run", corpus, hf_model=policy, server_urls="http://127.0.0.1:9", train_iters=1)
    program = f"""
import json, runpy, sys
from importlib.machinery import PathFinder
find, absent = PathFinder.find_spec, ("torch", "megatron", "transformer_engine", "sglang")
PathFinder.find_spec = lambda name, *more: None if name in absent else find(name, *more)
from megatron_pz.engine.sglang import client, fleet, pool
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.types import Completion

async def nothing(*args, **more): return {{"model_path": "m", "weight_version": "0"}}
async def generate(self, prompt_ids, params):
    ids = load_tokenizer({str(policy)!r}).encode(r"\\mask{{ is}}")
    return Completion(tuple(prompt_ids), tuple(ids), (-1.0,) * len(ids), "stop", (0,) * len(ids))
fleet.AttachedFleet.wait_ready, client.Client.get, pool.Pool.generate = nothing, nothing, generate
sys.argv = ["play.py", *{flags!r}]
try:
    runpy.run_path({str(ROOT / "tools" / "play.py")!r}, run_name="__main__")
except SystemExit as ended:
    print(json.dumps([ended.code, [name for name in sys.modules if name.split(".")[0] in absent]]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    *said, last = ended.stdout.splitlines()
    assert json.loads(last) == [0, []], ended.stderr[-3000:]
    assert said[-1].startswith("round 1: ") and said[-1].endswith(" responses generated, 0 read back")
    assert rows(tmp_path / "run", "rollouts.jsonl")


def test_without_servers_or_with_a_task_of_text_it_says_what_to_do(tool, places, tmp_path, capsys):
    flags = arguments(tmp_path / "run", places[1], hf_model=places[0])
    assert tool.main(flags) == 2
    assert "--server-urls is empty" in capsys.readouterr().err
    assert tool.main([*flags, "--server-urls", "http://127.0.0.1:9", "--task", "continue_pt"]) == 2
    assert "nothing to play" in capsys.readouterr().err
    assert tool.main([]) == 2
