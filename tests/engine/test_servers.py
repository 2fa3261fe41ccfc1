"""What servers are started with, and which are refused; nothing is started but small stand-ins."""

import asyncio
import dataclasses
import json
import socket
import stat
import sys
from pathlib import Path

import pytest

from megatron_pz.config.schema import Config
from megatron_pz.engine.sglang.fleet import AttachedFleet, LaunchedFleet, make_key
from megatron_pz.engine.sglang.serve import public_urls
from megatron_pz.engine.sglang.server import PortTaken, ServerProcess, ServerSpec, command, environment
from megatron_pz.engine.sglang.specs import context_length, make_fleet, server_specs, server_urls
from megatron_pz.engine.sglang.versions import check_version, installed_version
from megatron_pz.errors import ConfigError, EngineError


def spec(folder, **fields):
    given = {"model_path": "/model", "python": sys.executable, "host": "127.0.0.1", "port": 4000}
    return ServerSpec(**(given | {"log_path": Path(folder) / "logs" / "server-0.log", "api_key": "secret"} | fields))


def config(**sections):
    """A Config with some fields of some sections changed: config(sglang={"num_servers": 2})."""
    base = Config()
    return dataclasses.replace(
        base,
        **{
            name: dataclasses.replace(getattr(base, name), **fields)
            for name, fields in sections.items()
            if name != "server"
        },
        server=sections.get("server", {}),
    )


# ---- command line and environment


def test_a_cpu_server_sleeps_on_idle_and_takes_ids():
    line = " ".join(command(spec("/run"), Path("/run/key.yaml")))
    assert line.startswith(f"{sys.executable} -m sglang.launch_server --config /run/key.yaml --model-path /model")
    for part in (
        "--device cpu",
        "--attention-backend torch_native",
        "--sleep-on-idle",
        "--skip-tokenizer-init",
        "--port 4000",
    ):
        assert part in line
    assert "secret" not in line and "secret" not in repr(spec("/run"))  # others may list processes
    assert environment(spec("/run"), {})["SGLANG_USE_CPU_ENGINE"] == "1"


def test_a_gpu_server_gets_its_gpus_and_no_cpu_flags():
    gpu = spec("/run", gpus=(2, 3))
    line = " ".join(command(gpu, Path("/key")))
    assert "--tp-size 2" in line and "--device" not in line and "torch_native" not in line
    assert environment(gpu, {})["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert (
        environment(gpu, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c,GPU-d"})["CUDA_VISIBLE_DEVICES"] == "GPU-c,GPU-d"
    )
    with pytest.raises(EngineError, match="is to have GPU 3 .* CUDA_VISIBLE_DEVICES=0,1,2 has 3"):
        environment(gpu, {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_any_flag_passes_and_wins_over_the_defaults():
    flags = {"sleep_on_idle": False, "max-total-tokens": 100, "--chunked-prefill-size": -1, "lora-paths": ["a", "b"]}
    line = " ".join(command(spec("/run", flags=flags), Path("/key")))
    assert "--sleep-on-idle" not in line
    assert "--max-total-tokens 100" in line and "32768" not in line
    assert line.endswith("--chunked-prefill-size -1 --lora-paths a b")


@pytest.mark.parametrize("name", ["port", "tp_size", "--api-key", "model_path"])
def test_a_flag_that_the_run_sets_is_refused_with_the_setting_that_does(name):
    with pytest.raises(ConfigError, match=r"\[server\] sets .* which the run sets itself. It comes from"):
        command(spec("/run", flags={name: 1}), Path("/key"))


def test_what_torchrun_tells_its_ranks_is_not_told_to_servers():
    told = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "r",
    }
    assert environment(spec("/run"), told | {"PATH": "/bin", "OMP_NUM_THREADS": "3"}) == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "3",
        "SGLANG_USE_CPU_ENGINE": "1",
    }


# ---- from the settings


def test_each_server_has_its_own_port_log_seed_and_gpus(tmp_path):
    given = config(
        sglang={"num_servers": 2, "gpus_per_server": 2, "server_port": 4000, "colocate": True},
        model={"params_dtype": "bfloat16", "init": "random"},
        train={"routing_replay": True, "seed": 5},
        server={"mem-fraction-static": 0.4, "context-length": 99},
    )
    first, second = server_specs(given, tmp_path, tmp_path / "run", "key", context_length=512, first_gpu=4)
    assert (first.gpus, second.gpus) == ((4, 5), (6, 7))
    assert (first.port, second.port) == (4000, 4001)
    assert second.log_path == tmp_path / "run" / "logs" / "server-1.log"
    assert second.flags == {
        "dtype": "bfloat16",
        "context-length": 99,  # [server] wins
        "random-seed": 6,
        "load-format": "dummy",
        "enable-return-routed-experts": True,
        "enable-memory-saver": True,
        "mem-fraction-static": 0.4,
    }


def test_servers_with_fp8_weights_start_empty_and_with_room_for_them(tmp_path):
    given = config(sglang={"gpus_per_server": 1, "rollout_precision": "fp8_blockwise"})
    (spec,) = server_specs(given, tmp_path, tmp_path / "run", "key", context_length=512)
    assert spec.flags["load-format"] == "dummy"
    arguments = command(spec, tmp_path / "config.json")
    found = json.loads(arguments[arguments.index("--json-model-override-args") + 1])["quantization_config"]
    assert found["quant_method"] == "fp8" and found["weight_block_size"] == [128, 128]


def test_the_context_is_what_the_run_asks_for_and_the_model_takes():
    given = config(task={"max_prompt_tokens": 100}, engine={"max_response_tokens": 50})
    assert context_length(given, {"max_position_embeddings": 4096}) == 150
    assert context_length(given, {"max_position_embeddings": 128}) == 128
    assert context_length(given, {}) == 150


def test_servers_that_run_already_are_attached_to_with_their_key(tmp_path):
    (tmp_path / "key").write_text("abc\n")
    given = config(sglang={"server_urls": "http://a:1/, http://b:2", "api_key_file": str(tmp_path / "key")})
    fleet, key = make_fleet(given, tmp_path, tmp_path, context_length=1)
    assert isinstance(fleet, AttachedFleet) and fleet.urls == ("http://a:1", "http://b:2") and key == "abc"
    assert server_urls(config()) == []
    with pytest.raises(ConfigError, match="--api-key-file /no/such: No such file"):
        make_fleet(
            config(sglang={"server_urls": "http://a:1", "api_key_file": "/no/such"}),
            tmp_path,
            tmp_path,
            context_length=1,
        )


def test_the_key_is_new_and_for_its_owner_only(tmp_path):
    (tmp_path / "server.key").write_text("old")
    (tmp_path / "server.key").chmod(0o644)
    key = make_key(tmp_path)
    assert (tmp_path / "server.key").read_text() == key and len(key) == 32 and key != make_key(tmp_path)
    assert stat.S_IMODE((tmp_path / "server.key").stat().st_mode) == 0o600


def test_a_server_that_listens_everywhere_is_told_by_the_machines_name():
    assert public_urls(["http://0.0.0.0:1", "http://10.0.0.1:2"]) == [
        f"http://{socket.gethostname()}:1",
        "http://10.0.0.1:2",
    ]


# ---- versions


@pytest.mark.parametrize("version", ["0.5.21", "0.5.23.post1", "0.5.100"])
def test_a_supported_version_is_taken(version):
    check_version(version, "here")


@pytest.mark.parametrize("version", ["0.5.20", "0.4.9", "0.6", "0.6.0rc1", "1.0", "unknown", ""])
def test_another_version_is_refused_by_its_number(version):
    with pytest.raises(EngineError, match=r"http://a:1 has SGLang '.*'; supported is >=0.5.21, <0.6"):
        check_version(version, "http://a:1")


def test_an_interpreter_without_sglang_is_named():
    with pytest.raises(EngineError, match="has no SGLang .*--server-python"):
        installed_version(sys.executable)
    with pytest.raises(EngineError, match="/no/such/python does not start"):
        installed_version("/no/such/python")


# ---- what the real server cannot be made to do


SERVER = """
import http.server, json, pathlib, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
behaviour = json.loads(pathlib.Path(__file__).with_name("behaviour.json").read_text())
counter = pathlib.Path(__file__).with_name("starts")
starts = int(counter.read_text()) + 1 if counter.exists() else 1
counter.write_text(str(starts))
if starts <= behaviour.get("port_taken", 0):
    print("ERROR: [Errno 98] error while attempting to bind: address already in use", flush=True)
    time.sleep(600)
if behaviour.get("silent"):
    print("loading the model with", pathlib.Path(given["--config"]).read_text(), flush=True)
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Type", "application/json"); self.end_headers()
        self.wfile.write(json.dumps({"version": "0.5.20"}).encode())
    def log_message(self, *_): pass
http.server.HTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def fault_injecting_fake(tmp_path):
    """make(version="0.5.23", **behaviour) -> environment variables under which `-m sglang.launch_server` is a stand-in."""

    def make(version="0.5.23", **behaviour):
        folder = tmp_path / "fake"
        (folder / "sglang").mkdir(parents=True)
        (folder / f"sglang-{version}.dist-info").mkdir()
        (folder / f"sglang-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n"
        )
        (folder / "sglang" / "__init__.py").touch()
        (folder / "sglang" / "launch_server.py").write_text(SERVER)
        (folder / "sglang" / "behaviour.json").write_text(json.dumps(behaviour))
        return {"PYTHONPATH": str(folder)}

    return make


def test_an_old_server_is_refused_before_it_is_started(tmp_path, fault_injecting_fake):
    server = ServerProcess(spec(tmp_path, env=fault_injecting_fake("0.5.20")))
    with pytest.raises(EngineError, match="has SGLang '0.5.20'; supported is"):
        server.start()
    assert not server.is_alive()


def told():
    lines = []
    return lines, lambda waited, what: lines.append(what)


def test_a_port_that_was_taken_meanwhile_is_chosen_again(tmp_path, fault_injecting_fake):
    fleet = LaunchedFleet([spec(tmp_path, port=0, env=fault_injecting_fake(port_taken=1))])
    try:
        fleet.start()
        first = fleet.urls
        asyncio.run(fleet.wait_ready(30, lambda *_: None))
        assert fleet.urls != first and fleet.is_alive(0)
    finally:
        fleet.stop()
    assert not fleet.is_alive(0)


def test_a_port_that_stays_taken_is_an_error_and_nothing_is_left(tmp_path, fault_injecting_fake):
    env = fault_injecting_fake(port_taken=9)
    fleet = LaunchedFleet([spec(tmp_path, port=0, env=env)])
    fleet.start()
    with pytest.raises(PortTaken, match="Another program listens"):
        asyncio.run(fleet.wait_ready(30, lambda *_: None))
    assert (tmp_path / "fake" / "sglang" / "starts").read_text() == "3"
    assert not fleet.is_alive(0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EngineError, match="cannot listen on 127.0.0.1:[0-9]+: Address already in use"):
            LaunchedFleet([spec(tmp_path, port=taken.getsockname()[1], env=env)]).start()  # without a start


def test_a_server_that_is_not_ready_in_time_is_stopped_and_its_last_words_are_shown(tmp_path, fault_injecting_fake):
    fleet = LaunchedFleet([spec(tmp_path, port=0, env=fault_injecting_fake(silent=True))])
    fleet.start()
    lines, progress = told()
    with pytest.raises(EngineError, match="not ready after .*--server-start-timeout-s(.|\n)*loading the model"):
        asyncio.run(fleet.wait_ready(1.5, progress))
    assert lines == ['server 0: loading the model with {"api-key": "***"}']
    log = tmp_path / "logs" / "server-0.log"
    assert "secret" in log.read_text() and stat.S_IMODE(log.stat().st_mode) == 0o600
    assert not fleet.is_alive(0)


def test_after_stop_no_restart_in_the_background_starts_a_server(tmp_path, fault_injecting_fake):
    fleet = LaunchedFleet([spec(tmp_path, port=0, env=fault_injecting_fake())])
    fleet.start()
    fleet.stop()
    with pytest.raises(EngineError, match="the run is ending"):
        asyncio.run(fleet.restart(0, 10, lambda *_: None))
    assert not fleet.is_alive(0)


def test_an_attached_server_of_another_version_or_none_at_all_is_refused(tmp_path, fault_injecting_fake):
    fleet = LaunchedFleet([spec(tmp_path, port=0, env=fault_injecting_fake())])
    try:
        fleet.start()
        asyncio.run(fleet.wait_ready(30, lambda *_: None))
        with pytest.raises(EngineError, match=rf"{fleet.urls[0]} has SGLang '0.5.20'"):
            asyncio.run(AttachedFleet(fleet.urls, "key").wait_ready(10, lambda *_: None))
    finally:
        fleet.stop()
    with pytest.raises(
        EngineError, match="No SGLang server answered at http://127.0.0.1:[0-9]+ for 1 s .*tools/serve.py"
    ):
        asyncio.run(AttachedFleet(fleet.urls, "key").wait_ready(0.6, lambda *_: None))
