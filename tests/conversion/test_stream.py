"""Threads that wait for each other always go on, and whatever fails ends them all."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from dsv4_quant.checkpoint.sums import HashKind
from dsv4_quant.conversion import operations, plan, run, stream
from dsv4_quant.conversion.budget import Budget
from dsv4_quant.conversion.files import OutputFile, prefix_hashes
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import WriteError
from tests.conversion.checkpoints import tree

REQUEST = Request("mp", 2, "fp8")


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, frequent cuts, and room for only 64 KiB that wait to be hashed."""
    monkeypatch.setattr(run, "budget", lambda *args, **kwargs: Budget(2, 1 << 13, 0))
    monkeypatch.setattr(stream, "BATCH_BYTES", 1 << 12)
    monkeypatch.setattr(plan.cuts, "__defaults__", (1 << 16,))


def in_time(call: Callable[[], Any], seconds: float = 20) -> BaseException | None:
    """Runs a call that may hang; gives what it raised."""
    raised: list[BaseException | None] = []

    def body() -> None:
        try:
            call()
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    assert raised, "it hangs"
    return raised[0]


def slowed(first: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread is handed the first batch does ``first`` before it begins with it."""
    real = stream.work_in_threads

    def work_in_threads(items: Iterable[Any], make: Callable[[], Any], *rest: Any) -> None:
        def make_slow() -> Callable[[Any], None]:
            work = make()

            def slow(batch: Any) -> None:
                if batch[0].step == 0 and batch[0].start == 0:
                    first()
                work(batch)

            return slow

        real(items, make_slow, *rest)

    monkeypatch.setattr(stream, "work_in_threads", work_in_threads)


def test_a_thread_that_is_late_to_begin(
    tight: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others fill all the room with what must be hashed after its batch."""
    slowed(lambda: time.sleep(1), monkeypatch)
    assert in_time(lambda: convert(source, tmp_path / "slow", REQUEST)) is None
    monkeypatch.undo()
    convert(source, tmp_path / "usual", REQUEST)
    assert tree(tmp_path / "slow") == tree(tmp_path / "usual")


def test_a_thread_that_fails_while_others_wait_for_room(
    tight: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(lambda: time.sleep(1), monkeypatch)
    real = stream.Stream._take

    def take(self: stream.Stream, bite: stream.Bite, *tools: Any) -> None:
        if bite.step == 0:
            raise ZeroDivisionError
        real(self, bite, *tools)

    monkeypatch.setattr(stream.Stream, "_take", take)
    before = threading.active_count()
    raised = in_time(lambda: convert(source, tmp_path / "out", REQUEST))
    assert isinstance(raised, ZeroDivisionError)
    assert threading.active_count() == before


@pytest.mark.parametrize("method", ["sync", "write"])
def test_a_file_that_cannot_be_written(
    method: str, tight: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: OutputFile, *args: Any) -> None:
        raise WriteError("no")

    monkeypatch.setattr(OutputFile, method, fail)
    before = threading.active_count()
    assert isinstance(in_time(lambda: convert(source, tmp_path / "out", REQUEST)), WriteError)
    assert threading.active_count() == before


def test_no_descriptor_is_left_open(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "first", REQUEST)  # kernels and their caches are loaded
    before = descriptors()
    convert(source, tmp_path / "second", REQUEST)
    assert descriptors() == before

    def fail(fd: int, size: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().name.startswith("model1"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsv4_quant.conversion.files._allocate", fail)
    with pytest.raises(WriteError):
        convert(source, tmp_path / "third", REQUEST)
    assert descriptors() == before


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_order_of_threads_changes_nothing(
    tight: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = operations.weight
    count = iter(range(1 << 30))

    def uneven(*args: Any) -> Any:
        if next(count) % 5 == 0:
            time.sleep(0.005)
        return real(*args)

    monkeypatch.setattr(operations, "weight", uneven)
    convert(source, tmp_path / "uneven", REQUEST)
    convert(source, tmp_path / "one", REQUEST, workers=1, max_memory=1 << 30)
    monkeypatch.undo()
    convert(source, tmp_path / "usual", REQUEST, workers=7)
    assert tree(tmp_path / "uneven") == tree(tmp_path / "one") == tree(tmp_path / "usual")


class TestOutputFile:
    @pytest.mark.parametrize("kind", ["sha256", "blake3"])
    def test_hashes_in_order_whatever_the_order_of_writes(
        self, kind: HashKind, tmp_path: Path
    ) -> None:
        data = os.urandom(1000)
        file = OutputFile(tmp_path / "file", 1000, [300, 700], kind=kind)
        advanced = [
            file.write(start, memoryview(data[start:stop]))
            for start, stop in ((700, 1000), (0, 300), (500, 700), (300, 500))
        ]
        assert advanced == [0, 300, 0, 700]
        file.close()
        assert (tmp_path / "file").read_bytes() == data
        hashed = hashlib.sha256 if kind == "sha256" else blake3
        expected = {mark: hashed(data[:mark]).hexdigest() for mark in (300, 700, 1000)}
        assert file.marked == expected
        prefixes = prefix_hashes(tmp_path / "file", [700, 300, 1000, 2000], kind)
        assert {mark: held.hexdigest() for mark, held in prefixes.items()} == expected

    def test_a_mark_is_there_before_it_is_announced(self, tmp_path: Path) -> None:
        """The journal's thread looks at ``hashed`` at any time, and then takes the mark."""
        file = OutputFile(tmp_path / "file", 8, [4])
        seen = []

        class Hash:
            def update(self, data: Any) -> None:
                pass

            def copy(self) -> Hash:
                seen.append(file.hashed)
                return self

            def hexdigest(self) -> str:
                return "x"

        file._sum = Hash()
        file.write(0, memoryview(b"1234"))
        file.write(4, memoryview(b"5678"))
        file.close()
        assert seen == [0, 4]

    def test_a_write_after_closing_hits_no_other_file(self, tmp_path: Path) -> None:
        file = OutputFile(tmp_path / "file", 4, [])
        file.close()
        with (tmp_path / "other").open("wb") as other:  # takes the number of the descriptor
            with pytest.raises(WriteError):
                file.write(0, memoryview(b"1234"))
            assert os.fstat(other.fileno()).st_size == 0
        file.close()

    def test_a_size_that_no_disk_has_is_refused_when_the_file_is_made(self, tmp_path: Path) -> None:
        with pytest.raises(WriteError, match="Writing failed"):
            OutputFile(tmp_path / "file", 1 << 62, [])
