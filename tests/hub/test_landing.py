"""Files that bytes land in: holes where nothing is, and space that is given back."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4_quant.errors import DiskSpaceError, WriteError
from dsv4_quant.hub import landing as module
from dsv4_quant.hub.landing import Landing
from dsv4_quant.hub.schedule import BLOCK
from tests.conversion.conftest import Disk, disk

__all__ = ["disk"]

SIZE = 64 * BLOCK


@pytest.fixture
def landing(tmp_path: Path) -> Iterator[Landing]:
    landing = Landing(tmp_path / "file", SIZE)
    yield landing
    landing.close()


def space(landing: Landing) -> int:
    return landing.path.stat().st_blocks * 512


def content(landing: Landing) -> bytes:
    return b"".join(landing.read(0, SIZE))


def test_a_new_file_is_a_hole(landing: Landing) -> None:
    assert not landing.was_there and space(landing) == landing.filled() == 0
    assert content(landing) == bytes(SIZE)


def test_what_is_written_is_there_but_for_what_is_kept(landing: Landing) -> None:
    landing.write(10, b"a" * 90, [])
    landing.write(0, b"b" * 120, [(20, 30), (95, 100)])
    expected = b"b" * 20 + b"a" * 10 + b"b" * 65 + b"a" * 5 + b"b" * 20
    assert content(landing)[:120] == expected and landing.filled() == BLOCK
    out = bytearray(10)
    landing.read_into(15, memoryview(out))
    assert bytes(out) == expected[15:25]


def test_space_is_given_back(landing: Landing) -> None:
    data = os.urandom(SIZE)
    landing.write(0, data, [])
    assert space(landing) == SIZE == landing.filled()
    landing.free([(5 * BLOCK, 60 * BLOCK)], [(10 * BLOCK, 20 * BLOCK + 1)])
    kept = {*range(5), *range(10, 21), *range(60, 64)}
    assert space(landing) == len(kept) * BLOCK and landing.filled() == 5 * BLOCK
    found = content(landing)
    assert found[10 * BLOCK : 20 * BLOCK + 1] == data[10 * BLOCK : 20 * BLOCK + 1]
    assert found[20 * BLOCK + 1 : 60 * BLOCK] == bytes(40 * BLOCK - 1)
    assert found[: 5 * BLOCK] == data[: 5 * BLOCK] and found[60 * BLOCK :] == data[60 * BLOCK :]


def test_the_last_block_is_given_back_too(tmp_path: Path) -> None:
    landing = Landing(tmp_path / "file", SIZE + 1)
    landing.write(0, os.urandom(SIZE + 1), [])
    landing.free([(0, SIZE + 1)], [])
    assert space(landing) == 0 and landing.path.stat().st_size == SIZE + 1
    landing.close()


class NoHoles:
    """A filesystem without holes to punch, as NFS before 4.2."""

    def __init__(self, error: int = errno.EOPNOTSUPP) -> None:
        self.error = error

    def fallocate(self, *_: object) -> int:
        ctypes.set_errno(self.error)
        return -1


def test_where_no_holes_can_be_punched(landing: Landing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIBC", NoHoles())
    landing.write(0, b"a" * SIZE, [])
    landing.free([(0, 10 * BLOCK)], [(20 * BLOCK, SIZE)])
    assert content(landing) == b"a" * SIZE, "something of it is in use"
    landing.free([(0, SIZE)], [])
    assert space(landing) == 0 and content(landing) == bytes(SIZE)
    monkeypatch.setattr(module, "_LIBC", NoHoles(errno.EIO))
    with pytest.raises(WriteError, match="Input/output error"):
        landing.free([(0, SIZE)], [])


def test_what_an_earlier_run_left(landing: Landing) -> None:
    landing.write(0, b"a" * 10, [])
    again = Landing(landing.path, SIZE)
    assert again.was_there and content(again)[:10] == b"a" * 10
    again.close()
    other = Landing(landing.path, SIZE + 1)  # of another size: not this file
    assert not other.was_there and b"".join(other.read(0, 10)) == bytes(10)
    other.close()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError):
        Landing(tmp_path / "link", SIZE)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_somebody_cut(landing: Landing) -> None:
    os.truncate(landing.path, 100)
    with pytest.raises(WriteError, match="cut the file short"):
        content(landing)


def test_a_full_disk(disk: Disk) -> None:
    landing = Landing(disk.place / "file", 128 << 20)
    with pytest.raises(DiskSpaceError, match="Make room"):
        for at in range(0, 128 << 20, 1 << 20):
            landing.write(at, os.urandom(1 << 20), [])
    landing.close()
