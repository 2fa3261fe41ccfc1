"""The doctor is silent about a healthy run, and says of each broken one just what is broken."""

import json
import os
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_pz import __main__ as program
from megatron_pz.config.load import load_config
from megatron_pz.doctor import checks as the_checks
from megatron_pz.doctor import examine as doctor
from megatron_pz.doctor.patient import Patient
from megatron_pz.platform import versions

ROOT = Path(__file__).parents[2]
POLICY = ROOT / "examples" / "demo_policy"
TEXT = "Amber is fossilized tree resin that has been appreciated for its color and natural beauty. Paragraph {}."


def model_folder(folder, **changed):
    """The demo policy, with other values in its JSON files: `{file: {key: value}}`."""
    folder.mkdir()
    for file in POLICY.iterdir():
        if file.name in changed:
            values = json.loads(file.read_text()) | changed[file.name]
            (folder / file.name).write_text(json.dumps(values))
        else:
            os.symlink(file, folder / file.name)
    return folder


@pytest.fixture
def healthy(tmp_path):
    """Arguments of a run like `make demo`, on text made here."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXT.format(number)}) + "\n" for number in range(20)))
    flags = {"hf-model": POLICY, "template-dir": ROOT / "examples/templates/demo", "run-dir": tmp_path / "run"}
    flags |= {"data-path": texts, "held-out-path": texts, "num-fixed-masks": 4}
    return [
        str(ROOT / "examples/demo.toml"),
        *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
    ]


def told(healthy, *flags, world_size=2, **fields):
    """(thing, sentence) of each fault."""
    patient = Patient(load_config([*healthy, *map(str, flags)]), world_size, **fields)
    return [(fault.thing, fault.told) for fault in doctor.examine(patient, the_checks.LIGHT | the_checks.WHOLE)]


def one(faults, thing, *words):
    assert [found for found, _ in faults] == [thing], faults
    for word in words:
        assert word in faults[0][1], faults


def test_a_healthy_run_has_no_fault(healthy, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megatron_pz", "doctor", *healthy, "--world-size", "2"])
    assert program.main() == 0
    assert capsys.readouterr().out == "no fault found\n"


def test_all_faults_are_told_at_once_and_the_status_is_2(healthy, capsys, tmp_path):
    flags = ["--temperature", "0", "--template-dir", str(tmp_path / "none"), "--data-path", str(tmp_path / "no.jsonl")]
    assert doctor.main([*healthy, *flags, "--world-size", "2"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["settings", "templates", "corpus"], lines
    assert lines[-1] == "3 faults"


def test_a_layout_that_does_not_divide_the_ranks(healthy):
    one(told(healthy, "--tensor-model-parallel-size", 2, world_size=3), "settings", "3 ranks cannot be shared out")


def test_a_layout_that_does_not_divide_the_model(healthy):
    one(told(healthy, "--tensor-model-parallel-size", 3, world_size=3), "layout and memory", "must divide")


def test_more_updates_than_samples(healthy):
    one(told(healthy, "--updates-per-batch", 1000), "batch", "576 samples", "2 data-parallel replicas", "2000")


def test_memory(healthy):
    one(told(healthy, gpu_memory_gib=0.01), "layout and memory", "there are 0.0", "plan_layout")


def test_a_tokenizer_of_another_model(healthy, tmp_path):
    folder = model_folder(tmp_path / "small", **{"config.json": {"vocab_size": 3000}})
    one(told(healthy, "--hf-model", folder), "tokenizer", "ids up to 3999", "3000 embeddings")


def test_a_template_without_its_placeholder(healthy, tmp_path):
    (tmp_path / "mask.txt").write_text("no place")
    (tmp_path / "prediction.txt").write_text("{masked_paragraph}")
    one(told(healthy, "--template-dir", tmp_path), "templates", "lacks its placeholder {paragraph}")


CHAT = ["--prompt-style", "chat", "--template-dir", ""]


def test_a_tokenizer_without_a_chat_template(healthy):
    one(told(healthy, *CHAT), "chat template", "has no chat template")


def test_a_turn_that_ends_with_a_token_that_ends_no_response(healthy, tmp_path):
    turn = "{% for m in messages %}{{ m.content }}END{% endfor %}"
    folder = model_folder(tmp_path / "chat", **{"tokenizer_config.json": {"chat_template": turn}})
    one(told(healthy, *CHAT, "--hf-model", folder), "stop tokens", "no turn would end", "generation_config.json")


def test_a_corpus_that_cannot_be_read(healthy, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no JSON\n")
    one(told(healthy, "--data-path", bad), "corpus", "bad.jsonl:1")


@pytest.mark.parametrize("unreadable", [{"--template-dir": "none"}, {"--tokenizer": "none"}], ids=str)
def test_texts_are_examined_where_what_plays_them_is_at_fault(healthy, tmp_path, unreadable):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no JSON\n")
    (flag, name), texts = *unreadable.items(), ["--data-path", tmp_path / "no.jsonl", "--held-out-path", bad]
    faults = told(healthy, flag, tmp_path / name, *texts)
    of_texts = [fault for thing, fault in faults if thing == "corpus"]
    assert len(faults) == 3 and len(of_texts) == 2, faults
    assert of_texts[0].startswith("--data-path: There is no file") and "no.jsonl" in of_texts[0]
    assert of_texts[1].startswith("--held-out-path: ") and "bad.jsonl:1" in of_texts[1]


def test_a_corpus_shorter_than_a_step(healthy):
    one(told(healthy, "--paragraphs-per-step", 21), "corpus", "has 20 paragraphs", "begins 21")


def test_held_out_text_that_cannot_be_read(healthy, tmp_path):
    one(told(healthy, "--held-out-path", tmp_path / "none.jsonl"), "fixed masks", "--held-out-path")


def test_prompts_longer_than_the_model(healthy, tmp_path):
    folder = model_folder(tmp_path / "short", **{"config.json": {"max_position_embeddings": 16}})
    one(told(healthy, "--hf-model", folder), "positions", "max_position_embeddings is 16")


def test_a_full_disk(healthy, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(the_checks.shutil, "disk_usage", lambda place: usage(2**40, 2**40, 1000))
    one(told(healthy), "disk", "0.00 GiB of free disk", "3 checkpoints", "0 folders of weights")


def test_a_disk_that_holds_the_checkpoints_but_not_the_exported_folder(healthy, monkeypatch, tmp_path):
    flags = ["--save-interval", 0]
    saved = Patient(load_config([*healthy, *map(str, flags)]), 2).plan.saves
    usage = namedtuple("usage", "total used free")
    free = saved.checkpoint_bytes + saved.weights_bytes
    assert 0 < saved.weights_bytes < saved.checkpoint_bytes
    monkeypatch.setattr(the_checks.shutil, "disk_usage", lambda place: usage(2**40, 2**40, free))
    assert told(healthy, *flags) == []
    monkeypatch.setattr(the_checks.shutil, "disk_usage", lambda place: usage(2**40, 2**40, free - 1))
    one(told(healthy, *flags), "disk", "1 checkpoints", "1 folders of weights", "--no-export-hf")
    assert told(healthy, *flags, "--no-export-hf") == []


def test_a_port_that_is_taken(healthy, monkeypatch):
    monkeypatch.setattr(the_checks, "installed_version", lambda python: "0.5.23")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        one(told(healthy, "--engine", "sglang", "--server-port", port), "servers", f"127.0.0.1:{port}")


def test_servers_without_sglang(healthy):
    one(told(healthy, "--engine", "sglang", "--server-python", sys.executable), "servers", "has no SGLang")


def test_a_resumed_run_with_its_optimizer_on_the_host(healthy, tmp_path):
    flags = ["--optimizer.optimizer_cpu_offload", "true"]
    assert told(healthy, *flags, platform="cuda") == []
    (tmp_path / "run/checkpoints/step_000010").mkdir(parents=True)
    one(told(healthy, *flags, platform="cuda"), "optimizer", "step_000010", "--load")


def test_an_optimizer_that_is_moved_to_the_host_it_is_on(healthy):
    one(told(healthy, "--optimizer.optimizer_cpu_offload", "true"), "optimizer", "platform cpu", "Leave it out")


def test_light_checks_need_nothing_but_python():
    names = "{'torch', 'transformers', 'megatron'}"
    code = f"import sys; from megatron_pz.doctor import examine; print(sorted({names} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_versions_out_of_range(healthy, capsys, monkeypatch):
    found = versions.installed() | {"transformers": "4.0"}
    monkeypatch.setattr(versions, "installed", lambda: found)
    assert doctor.main([*healthy, "--world-size", "2"]) == 2
    out = capsys.readouterr().out
    assert out.startswith("versions: ") and "transformers is 4.0" in out and out.endswith("\n1 fault\n")


def test_a_setting_that_does_not_exist(healthy, capsys):
    assert doctor.main([*healthy, "--no-such-flag", "1"]) == 2
    assert "settings: command line: no flag --no-such-flag" in capsys.readouterr().out
