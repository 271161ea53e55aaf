"""A board that knows how long it has owed an answer.

A question that a broken network swallows is never answered, and nothing in its process can end the
waiting for it: only another thread sees that it takes too long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dsv4_quant.team.board import Board


class AskedBoard:
    """The same board; ``owing`` may be called from any thread at any time."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._asked: dict[int, float] = {}
        """By thread, since when it has been waiting."""

    def owing(self) -> float:
        """Seconds for which the oldest question has not been answered; 0 if there is none."""
        now = time.monotonic()
        return max((now - since for since in list(self._asked.values())), default=0.0)

    @contextmanager
    def _asking(self) -> Iterator[Board]:
        me = threading.get_ident()
        self._asked[me] = time.monotonic()
        try:
            yield self._board
        finally:
            del self._asked[me]

    def set(self, key: str, value: bytes) -> None:
        """See Board."""
        with self._asking() as board:
            board.set(key, value)

    def get(self, key: str) -> bytes:
        """See Board."""
        with self._asking() as board:
            return board.get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """See Board."""
        with self._asking() as board:
            return board.multi_get(keys)

    def check(self, keys: list[str]) -> bool:
        """See Board."""
        with self._asking() as board:
            return board.check(keys)

    def add(self, key: str, amount: int) -> int:
        """See Board."""
        with self._asking() as board:
            return board.add(key, amount)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """See Board."""
        with self._asking() as board:
            return board.compare_set(key, expected, desired)

    def delete_key(self, key: str) -> bool:
        """See Board."""
        with self._asking() as board:
            return board.delete_key(key)
