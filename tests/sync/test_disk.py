"""Folders of versions: the newest two stay, a refusal is tried once more (sync/disk.py)."""

import pytest

from megatron_pz.engine.sglang.control import Control
from megatron_pz.engine.sglang.faults import ServerLost, ServerRefused
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.sync import disk
from megatron_pz.sync.disk import DiskTransport
from megatron_pz.sync.push import Receivers


class ReadingClient:
    """Fails with `faults` in turn, then reads."""

    url = "http://reading"

    def __init__(self, *faults):
        self.faults, self.asked = list(faults), []

    async def post(self, path, body, timeout_s=None):
        self.asked.append((path, body["model_path"], body["weight_version"]))
        if self.faults:
            raise self.faults.pop(0)
        return {"success": True}


@pytest.fixture(scope="module")
def io():
    thread = IoThread()
    yield thread
    thread.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(disk, "RETRY_AFTER_S", 0.0)


def write(weights, folder):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * weights)


def sent(io, root, versions, client):
    transport = DiskTransport(write, root, True, flushes=True)
    found = []
    for version in versions:
        receivers = Receivers(io, {0: Control(client)})
        found.append((transport.send(10 + version, version, receivers), receivers.faults))
    return found


def test_the_newest_two_folders_stay(io, tmp_path):
    client = ReadingClient()
    reports = sent(io, tmp_path, [1, 2, 3], client)
    assert [report.num_bytes for report, _ in reports] == [11, 12, 13]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["v000002", "v000003"]
    assert client.asked[-1] == ("/update_weights_from_disk", str(tmp_path / "v000003"), "3")


def test_a_run_that_went_back_keeps_what_it_writes_and_leaves_nothing_of_the_one_that_was_killed(io, tmp_path):
    for name in ("v000005", "v000011", "v000012", ".tmp-v000013", ".old-v000012"):
        (tmp_path / name).mkdir()
    sent(io, tmp_path, [6], ReadingClient())
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["v000005", "v000006"]


def test_a_refusal_is_tried_once_more_and_a_server_that_is_lost_is_not(io, tmp_path):
    refused = ServerRefused("u", "/update_weights_from_disk", 400, "no such folder")
    once, twice, lost = ReadingClient(refused), ReadingClient(refused, refused), ReadingClient(ServerLost("gone"))
    for version, (client, faults, times) in enumerate(((once, 0, 2), (twice, 1, 2), (lost, 1, 1))):
        ((_, found),) = sent(io, tmp_path, [version], client)
        assert (len(found), len(client.asked)) == (faults, times)
