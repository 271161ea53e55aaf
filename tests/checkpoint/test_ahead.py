"""What will be read is announced to the disk: all of it, in time, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsv4_quant.catalogue import StoredTensor
from dsv4_quant.checkpoint import ahead
from dsv4_quant.checkpoint.ahead import PIECE, announced, will_read
from dsv4_quant.checkpoint.digesting import digest
from dsv4_quant.checkpoint.panels import row_unit
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.model import forward
from dsv4_quant.validators.checksums import hash_file
from dsv4_quant.validators.verify import verify
from tests.conversion.checkpoints import config, formats, write_checkpoint

Bytes = dict[str, NDArray[np.bool_]]
"""By file, which of its bytes."""


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 40))
def test_items_come_in_order_and_what_follows_was_announced(sizes: list[int], window: int) -> None:
    told: list[int] = []

    def announce(item: tuple[int, int]) -> int:
        told.append(item[1])
        return item[1]

    handed = 0
    for number, _ in announced(enumerate(sizes), announce, window):
        assert number == handed
        handed += 1
        waiting = sum(told[number:])
        assert waiting > window or len(told) == len(sizes)
        assert sum(told[number:-1]) <= window  # and no more than that
    assert handed == len(sizes)


def test_a_range_is_announced_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: told.append(call))
    will_read(5, 3, 3 + 2 * PIECE + 9)
    wanted = os.POSIX_FADV_WILLNEED
    assert told == [
        (5, 3, PIECE, wanted),
        (5, 3 + PIECE, PIECE, wanted),
        (5, 3 + 2 * PIECE, 9, wanted),
    ]


def test_what_cannot_be_announced_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    will_read(reading, 0, 10)  # a pipe is no file to read ahead
    os.close(reading)
    os.close(writing)
    will_read(writing, 0, 10)
    with Checkpoint.open(write_checkpoint(tmp_path, config())) as held:
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
        assert held.announce("embed.weight", 0, 8) > 0


@dataclass
class Seen:
    """What was announced and what was read so far."""

    told: Bytes = field(default_factory=dict)
    read: Bytes = field(default_factory=dict)
    only_announced: bool = True
    """Whether it is an error to read anything else."""

    def clear(self) -> None:
        self.told.clear()
        self.read.clear()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    fadvise, preadv = os.posix_fadvise, os.preadv

    def of(held: Bytes, fd: int) -> NDArray[np.bool_]:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        return held.setdefault(name, np.zeros(os.fstat(fd).st_size, bool))

    def announcing(fd: int, start: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            of(seen.told, fd)[start : start + length] = True
        fadvise(fd, start, length, advice)

    def reading(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        count = preadv(fd, buffers, offset, *flags)
        of(seen.read, fd)[offset : offset + count] = True
        if seen.only_announced:
            assert of(seen.told, fd)[offset : offset + count].all(), "read, and not announced"
        return count

    monkeypatch.setattr(os, "posix_fadvise", announcing)
    monkeypatch.setattr(os, "preadv", reading)
    return seen


def small_scales(tensor: StoredTensor, rng: np.random.Generator) -> NDArray[Any] | None:
    """Of which FP8 can be made, rounding or not."""
    return rng.integers(110, 116, tensor.shape, np.uint8) if tensor.is_scale else None


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """One checkpoint in both layouts."""
    root = tmp_path_factory.mktemp("sources")
    small = config(num_hidden_layers=1, compress_ratios=[4], num_nextn_predict_layers=0)
    write_checkpoint(root / "raw", small, formats("fp4"), values=small_scales)
    convert(root / "raw", root / "hf", Request("hf"))
    convert(root / "raw", root / "mp", Request("mp", 2))
    yield {"hf": root / "hf", "mp": root / "mp"}


@pytest.mark.parametrize("layout", ["hf", "mp"])
def test_rows_are_announced_as_they_are_read(
    layout: str, sources: dict[str, Path], disk: Seen
) -> None:
    told, read = disk.told, disk.read
    chance = np.random.default_rng(1)
    with Checkpoint.open(sources[layout]) as held:
        for name, spec in held.specs.items():
            disk.clear()
            unit = row_unit(spec, ()) if spec.format.block is None else spec.format.block[0]
            start = int(chance.integers(spec.matrix[0])) // unit * unit
            stop = min(start + int(chance.integers(1, 3)) * unit, spec.matrix[0])
            count = held.announce(name, start, stop, copies=True)
            held.read_rows(name, start, stop, copies=True)
            assert told.keys() == read.keys()
            assert all(np.array_equal(told[file], read[file]) for file in told)
            assert count == sum(int(of.sum()) for of in read.values())
            if len(held.stored(spec)) == 2:
                scales = held.announce(name, start, stop, codes=False)
                assert 0 < scales < count


Job = Callable[[Path, Path], object]

JOBS: dict[str, Job] = {
    "copy": lambda src, out: convert(src, out, Request("hf")),
    "cast": lambda src, out: convert(src, out, Request("mp", 2, "fp8")),
    "round": lambda src, out: convert(src, out, Request("hf", 1, "fp8", lossy=True)),
    "digest": lambda src, out: digest(src),
    "verify": lambda src, out: verify(src, level="values"),
}


@pytest.mark.parametrize("layout", ["hf", "mp"])
@pytest.mark.parametrize("job", JOBS)
def test_every_byte_is_announced_before_it_is_read(
    job: str,
    layout: str,
    sources: dict[str, Path],
    disk: Seen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, read = disk.told, disk.read
    monkeypatch.setattr(ahead.announced, "__defaults__", (1 << 14,))
    JOBS[job](sources[layout], tmp_path / "out")
    weights = {name: held for name, held in read.items() if name.endswith(".safetensors")}
    assert weights and all(held.any() for held in weights.values())
    if job != "verify":  # that hashes the files as well, headers and all
        assert all(np.array_equal(told[name], held) for name, held in weights.items())


@pytest.mark.parametrize("layout", ["hf", "mp"])
def test_a_pass_announces_what_it_will_need(
    layout: str, sources: dict[str, Path], disk: Seen
) -> None:
    """What it needs at once it reads unannounced; the rest is told, and nothing besides."""
    disk.only_announced = False
    with Checkpoint.open(sources[layout]) as held:
        forward(held, [[1, 5, 2]])
    for name, told in disk.told.items():
        assert not (told & ~disk.read[name]).any()
    told, read = (sum(int(of.sum()) for of in held.values()) for held in (disk.told, disk.read))
    assert told > 0.8 * read


def test_a_file_is_hashed_behind_its_announcement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4_quant.validators.checksums.WINDOW", 100)
    told: list[tuple[int, int]] = []
    at: list[int] = []
    monkeypatch.setattr(
        "dsv4_quant.validators.checksums.will_read", lambda fd, a, b: told.append((a, b))
    )
    (tmp_path / "file").write_bytes(bytes(250))
    buffer = np.empty(60, np.uint8)
    hash_file(tmp_path / "file", ["blake3"], buffer, lambda n: at.append(told[-1][1]))
    assert told[0] == (0, 100)
    assert [stop for _, stop in told if stop <= 250] == [100, 160, 220, 250, 250, 250]
    assert all(a == b or a == 250 <= b for (_, a), (b, _) in pairwise(told))
