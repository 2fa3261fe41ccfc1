"""The server manager with the real server: ready, refused, killed, started again, and nothing left behind."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.control import Control
from megatron_pz.engine.sglang.fleet import AttachedFleet
from megatron_pz.engine.sglang.server import ServerProcess, ServerSpec
from megatron_pz.errors import EngineError

ROOT = Path(__file__).parents[2]

# A trainer with one server: starts it, starts it again when it is lost, tells both, and goes on.
TRAINER = """
import asyncio, sys, time
from pathlib import Path
from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.control import Control
from megatron_pz.engine.sglang.fleet import LaunchedFleet
from megatron_pz.engine.sglang.server import ServerSpec
model, python, folder = sys.argv[1:]
spec = ServerSpec(model, python, "127.0.0.1", 0, Path(folder) / "logs" / "server-0.log", "key", flags={"dtype": "float32"})
fleet = LaunchedFleet([spec])
fleet.start()
asyncio.run(fleet.wait_ready(250, lambda waited, what: None))
print("ready", fleet.urls[0], fleet.servers[0].pid, flush=True)
while fleet.is_alive(0):
    time.sleep(0.1)
print(repr(fleet.servers[0].death()), flush=True)
asyncio.run(fleet.restart(0, 250, lambda waited, what: None))
print("ready", fleet.urls[0], fleet.servers[0].pid, flush=True)
time.sleep(600)
"""


def tree(pid: int) -> set[int]:
    """`pid` and every process below it."""
    found = {pid}
    for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split():
        found |= tree(int(child))
    return found


def are_gone(pids: set[int], timeout_s: float) -> bool:
    """Whether all of `pids` have ended within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            print("still there:", left)
            return False
        time.sleep(0.1)
    return True


def digests(reply) -> dict[str, str]:
    """Digest of each tensor, from a reply of /weights_checker."""
    (rank,) = reply["ranks"]
    return rank["checksums"]


def test_a_server_answers_in_ids_under_its_key_only(server):
    reply = server.call("/generate", {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4}})
    assert len(reply["output_ids"]) == 4
    listed = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(server.pid)], capture_output=True, text=True).stdout
    assert "--model-path" in listed and server.api_key not in listed
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.url}/model_info", timeout=10)


def test_a_server_is_attached_to_with_its_key_only(server):
    asyncio.run(AttachedFleet([f"{server.url}/"], server.api_key).wait_ready(10, lambda *_: None))
    with pytest.raises(EngineError, match=rf"{server.url} refuses the key \(HTTP 401\).*--api-key-file"):
        asyncio.run(AttachedFleet([server.url], "another").wait_ready(10, lambda *_: None))


def test_a_flag_that_the_server_does_not_know_is_told_in_its_own_words(server_python, tmp_path):
    spec = ServerSpec(
        "/m", str(server_python), "127.0.0.1", 4000, tmp_path / "server-0.log", "key", flags={"no-such-flag": 3}
    )
    server = ServerProcess(spec)
    server.start()
    with pytest.raises(EngineError, match=r"has ended \(exit code 2\)(.|\n)*unrecognized arguments: --no-such-flag 3"):
        asyncio.run(server.wait_ready(250))


def test_a_killed_server_comes_back_and_none_outlives_a_killed_trainer(server_python, dense_model, tmp_path):
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(dense_model), str(server_python), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        _, url, pid = trainer.stdout.readline().split()
        first = tree(int(pid))
        assert len(first) >= 4  # main, resource tracker, scheduler, detokenizer
        os.kill(int(pid), signal.SIGKILL)
        death = trainer.stdout.readline()
        assert url in death and "has ended (SIGKILL)" in death and "ready to roll" in death
        assert are_gone(first, 0)  # before the trainer learns of it
        _, url_again, pid = trainer.stdout.readline().split()
        assert url_again == url
        second = tree(trainer.pid)
        assert int(pid) in second and len(second) >= 6  # with the trainer and the supervisor
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    assert are_gone(second, 30)


def test_serve_starts_the_servers_of_a_run_and_leaves_none_behind(server, server_python, dense_model, tmp_path):
    async def checksums(url, key):
        client = Client(url, key, vocab_size=server.vocab_size, context_length=server.context_length)
        before = await (control := Control(client)).checksums()
        assert (await control.server_info())["context_length"] == 128
        await control.update_weights_from_disk(str(dense_model), "7", flush_cache=True)
        after = await control.checksums()
        assert await control.weight_version() == "7"
        await client.close()
        return digests(before), digests(after)

    flags = {
        "init": "random",
        "run-dir": tmp_path / "run",
        "hf-model": dense_model,
        "server-python": server_python,
        "max-paragraph-tokens": 90,
        "max-prompt-tokens": 100,
        "max-response-tokens": 28,
    }
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    serve = subprocess.Popen(
        [sys.executable, "tools/serve.py", "examples/demo.toml", *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = serve.stdout.readline()
        found = re.fullmatch(r"ready: --server-urls (http://127.0.0.1:\d+) --api-key-file (\S+)\n", line)
        assert found, line + serve.stderr.read()
        url, key_file = found.groups()
        random, read = asyncio.run(checksums(url, Path(key_file).read_text()))
        # The server began with weights of its own, and reads files all the same when it is told to.
        assert random != read == digests(server.call("/weights_checker", {"action": "checksum"}))
        below = tree(serve.pid)
        assert len(below) >= 6
        serve.send_signal(signal.SIGTERM)
        assert serve.wait(60) == 0
        assert are_gone(below, 0)
        assert "serve: servers are stopped" in serve.stderr.read()
    finally:
        serve.kill()
        serve.communicate()
    assert (tmp_path / "run" / "logs" / "server-0.log").stat().st_size > 0
