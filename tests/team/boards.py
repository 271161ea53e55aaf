"""A board in memory, and processes that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dsv4_quant.team.crew import Crew
from dsv4_quant.team.watch import Member


class MemoryBoard:
    """What torch's TCPStore does, for threads. ``gone`` is set when the one that keeps it ends."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.gone = False
        self._lock = threading.Lock()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        if self.gone:
            raise RuntimeError("Connection was likely closed")
        with self._lock:
            yield

    def set(self, key: str, value: bytes) -> None:
        with self._reached():
            assert len(value) <= 8 << 20
            self.held[key] = value

    def get(self, key: str) -> bytes:
        with self._reached():
            return self.held[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        with self._reached():
            return [self.held[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        with self._reached():
            return all(key in self.held for key in keys)

    def add(self, key: str, amount: int) -> int:
        with self._reached():
            count = int(self.held.get(key, b"0")) + amount
            self.held[key] = str(count).encode()
            return count

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        with self._reached():
            assert expected == ""
            return self.held.setdefault(key, desired.encode())

    def delete_key(self, key: str) -> bool:
        with self._reached():
            return self.held.pop(key, None) is not None


def member(machine: str = "m", pid: int = 0, cores: tuple[int, ...] = (0, 1)) -> Member:
    """Someone whose process id nobody here can see."""
    return Member("host", machine, f"of {pid}", pid, cores)


Outcome = tuple[Any, list[Any]]


def all_of(
    size: int,
    program: Callable[[Crew], Any],
    board: MemoryBoard | None = None,
    members: list[Member] | None = None,
    locals_: list[int] | None = None,
) -> list[Any]:
    """Runs a program in so many threads; per rank what it returned or raised."""
    held = board or MemoryBoard()
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            crew = Crew(
                rank, size, held,
                member=members[rank] if members else member(pid=rank),
                local=locals_[rank] if locals_ else None,
            )  # fmt: skip
            try:
                found[rank] = program(crew)
            except BaseException as error:
                found[rank] = crew.fail(error)
            finally:
                crew.close()
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "it hangs"
    return found
