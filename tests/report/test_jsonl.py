"""JSON lines that survive kills, full disks and odd values."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.errors import DiskError
from megatron_pz.report.jsonl import Damage, JsonLines, cut_after, read_rows, step_of, to_line

ROOT = Path(__file__).parents[2]


def test_rows_come_back_as_they_were_put(tmp_path):
    rows = [{"step": 1, "response": "línea\nnew </script> \u2028 🗾"}, {"step": 2, "reward": 0.5}]
    file = JsonLines(tmp_path / "deep" / "rows.jsonl")
    file.append(rows[:1])
    file.append(rows[1:])
    assert list(read_rows(tmp_path / "deep" / "rows.jsonl")) == rows  # readable before it is closed
    file.close()
    assert len((tmp_path / "deep" / "rows.jsonl").read_bytes().split(b"\n")) == 3


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.floats() | st.none() | st.lists(st.floats())))
def test_a_row_is_one_line_of_strict_json(row):
    line = to_line(row)
    assert line.endswith("\n") and line.count("\n") == 1

    def refuse(word):
        raise AssertionError(word)

    assert set(json.loads(line, parse_constant=refuse)) == set(row)


def test_nan_becomes_null_and_step_comes_first():
    assert to_line({"loss": float("nan"), "step": 3, "all": [float("inf"), 1.0]}) == (
        '{"step": 3, "loss": null, "all": [null, 1.0]}\n'
    )


def test_a_lone_surrogate_can_be_written():
    line = to_line({"response": "a\ud800"})
    assert line == '{"response": "a\\ud800"}\n'
    assert line.encode("utf-8")


def test_a_cut_off_last_line_is_passed_over_and_removed_before_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "respon')
    damage = Damage()
    assert list(read_rows(path, damage)) == [{"step": 1}]
    assert damage.num_lines == 1
    file = JsonLines(path)
    file.append([{"step": 2}])
    file.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("size", [10, 70_000, 200_000])
def test_a_cut_off_line_of_any_length_is_removed(tmp_path, size):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"x" * size)
    JsonLines(path).close()
    assert path.read_bytes() == b'{"step": 1}\n'
    path.write_bytes(b"x" * size)
    JsonLines(path).close()
    assert path.read_bytes() == b""


def test_a_process_killed_while_it_writes_leaves_whole_lines_or_one_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from pathlib import Path; from megatron_pz.report.jsonl import JsonLines\n"
        "file, n = JsonLines(Path(sys.argv[1])), 0\n"
        "print('go', flush=True)\n"
        "while True:\n    n += 1; file.append([{'step': n, 'response': 'x' * 3000}] * 5)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"go\n"
    while path.stat().st_size < 300_000:
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    child.stdout.close()
    damage = Damage()
    steps = [row["step"] for row in read_rows(path, damage)]
    assert damage.num_lines <= 1
    assert steps == sorted(steps) and len(steps) >= 50


def test_a_full_disk_is_told_and_the_file_is_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = JsonLines(path)
    file.append([{"step": 1}])
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(DiskError, match=r"rows.jsonl: 10\d+ bytes could not be written: File too large"):
            file.append([{"step": 2, "response": "x" * 10_000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert path.read_bytes() == before
    file.append([{"step": 2}])
    file.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_a_file_that_cannot_be_opened_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be opened: .*--run-dir"):
        JsonLines(tmp_path / "file" / "rows.jsonl")


def test_a_continued_run_cuts_off_what_it_will_do_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(to_line({"step": s, "n": n}) for s in (0, 1, 2, 3) for n in (1, 2)) + '{"step": 3, "n')
    assert cut_after(path, 2) == 3
    assert [row["step"] for row in read_rows(path)] == [0, 0, 1, 1, 2, 2]
    assert cut_after(path, 2) == 0
    assert cut_after(path, -1) == 6
    assert path.read_bytes() == b""
    assert cut_after(tmp_path / "none.jsonl", 3) == 0


def test_the_step_is_read_off_the_head_of_a_line():
    assert step_of(b'{"step":7,"response":"' + b"not even JSON") == 7
    assert step_of(b'{"loss": 1, "step": 9}') == 9
    assert step_of(b'{"step": "nine"}') is None
    assert step_of(b'{"step": true}') is None
    assert step_of(b"garbage") is None
