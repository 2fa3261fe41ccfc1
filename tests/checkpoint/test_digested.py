"""Digests made beside the writing are those of the file; mapped numbers are the file's (checkpoint/digested.py)."""

import errno
import zlib
from threading import Event

import pytest
import torch

from megatron_pz.checkpoint import digested, mapped
from megatron_pz.checkpoint.checksum import Crc32, told
from megatron_pz.checkpoint.digested import DigestedFile
from megatron_pz.checkpoint.mapped import MappedFile, exact


def test_the_checksum_is_that_of_the_file_however_its_bytes_came(tmp_path, monkeypatch):
    monkeypatch.setattr(digested, "BEHIND", 100)  # the checksum is waited for
    monkeypatch.setattr(digested, "FLUSH_EVERY", 64)
    monkeypatch.setattr(digested, "SMALL", 32)  # some are gathered, some are not
    file = DigestedFile(tmp_path / "a")
    buffer = bytearray(b"changed after it was written")
    file.write(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    for size in (0, 7, 1000):
        file.write_tensor(torch.arange(size, dtype=torch.float32))
    assert file.tell() == 28 + 4 * 1007
    found = file.finish()
    written = (tmp_path / "a").read_bytes()
    assert written.startswith(b"changed after it was written") and len(written) == 28 + 4 * 1007
    assert found == f"crc32:{zlib.crc32(written):08x}"


def test_the_checksums_of_parts_make_that_of_the_whole():
    data = bytes(range(256)) * 40
    for cut in (0, 1, 255, 5000, len(data)):
        found = Crc32()
        for part in (data[:cut], data[cut:]):
            found.join(zlib.crc32(part), len(part))
        assert found.value == zlib.crc32(data)
    # By hand, from the CRC's definition: "123456789" has cbf43926.
    found = Crc32()
    found.update(memoryview(b"1234"))
    found.join(zlib.crc32(b"56789"), 5)
    assert told(found) == "crc32:cbf43926"


def test_blocks_that_are_written_in_any_order_make_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(digested, "BLOCK", 1000)
    monkeypatch.setattr(digested, "CACHED", 300)
    monkeypatch.setattr(digested, "SMALL", 10)
    values = torch.arange(10_000, dtype=torch.int32)
    late = Event()
    stock = digested.os.pwrite

    def some_wait(handle, block, offset):
        if offset == 0:
            late.wait(10)  # for the third block
        elif offset >= 2000:
            late.set()
        return stock(handle, block[:7], offset)  # the kernel may take less than it was given

    monkeypatch.setattr(digested, "WRITERS", 4)
    monkeypatch.setattr(digested.os, "pwrite", some_wait)
    file = DigestedFile(tmp_path / "a")
    file.write_tensor(values)
    found = file.finish()
    assert late.is_set()
    assert (tmp_path / "a").read_bytes() == values.numpy().tobytes()
    assert found == f"crc32:{zlib.crc32(values.numpy().tobytes()):08x}"


def test_a_disk_that_refuses_is_told_of_whatever_thread_met_it(tmp_path, monkeypatch):
    def full(handle, block, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(digested.os, "pwrite", full)
    file = DigestedFile(tmp_path / "a")
    with pytest.raises(OSError, match="No space left"):
        file.write_tensor(torch.zeros(2**20))
        file.finish()
    assert file.fault is not None and file.fault.errno == errno.ENOSPC


def test_the_disk_begins_before_the_end_and_what_it_says_is_told(tmp_path, monkeypatch):
    asked = []

    def full(handle):
        asked.append(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(digested, "FLUSH_EVERY", 64)
    monkeypatch.setattr(digested, "SMALL", 1)
    monkeypatch.setattr(digested.os, "fdatasync", full)
    file = DigestedFile(tmp_path / "a")
    file.write(bytes(63))
    assert not asked
    file.write(bytes(1))
    with pytest.raises(OSError, match="No space left"):
        file.finish()
    assert len(asked) == 1


def test_a_broken_file_is_closed_without_a_checksum(tmp_path):
    file = DigestedFile(tmp_path / "a")
    file.write(b"half")
    file.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        file.finish()


def test_mapped_numbers_may_stand_at_odd_places_and_outlive_their_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "KEPT", 8)  # every second tensor lets go of the pages of the one before
    values = torch.arange(12, dtype=torch.float32)
    (tmp_path / "a").write_bytes(b"x" + values.numpy().tobytes())
    file = MappedFile(tmp_path / "a")
    first, second = file.tensor(1, torch.float32, (2, 3)), file.tensor(25, torch.float32, (6,))
    assert torch.equal(first, values[:6].reshape(2, 3)) and torch.equal(second, values[6:])
    assert file.tensor(3, torch.bfloat16, (0, 4)).shape == (0, 4)
    assert bytes(file.part(0, 1)) == b"x"


def test_a_part_of_a_tensor_gets_a_storage_of_its_own_size():
    whole = torch.arange(10, dtype=torch.bfloat16)
    part = exact(whole[4:8].reshape(2, 2))
    assert torch.equal(part, whole[4:8].reshape(2, 2)) and part.untyped_storage().nbytes() == 8
    assert part.data_ptr() == whole[4:].data_ptr()
