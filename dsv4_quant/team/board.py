"""What processes write to each other: values under names, and how they become bytes.

Only values of this library, NumPy arrays and Python's own errors are read back. So whoever else
can reach the board's port can stop a job, but not run code in it.
"""

from __future__ import annotations

import pickle
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from io import BytesIO
from typing import Any, Protocol

PIECE = 4 << 20
"""torch's TCPStore takes up to 8 MiB at once."""

_ARRAYS = (
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.numeric._frombuffer",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "collections.Counter",
)


class Board(Protocol):
    """A small part of torch.distributed.Store. Every call may raise RuntimeError."""

    def set(self, key: str, value: bytes) -> None:
        """Writes a value of up to 8 MiB."""

    def get(self, key: str) -> bytes:
        """Reads a value that is there."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Reads several that are there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them are there."""

    def add(self, key: str, amount: int) -> int:
        """Counts up; gives the new count."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Writes unless another has; with expected "" the first wins. Gives what is there."""

    def delete_key(self, key: str) -> bool:
        """Forgets a value."""


def put(board: Board, key: str, value: Any) -> None:
    """Writes a value of any size."""
    data = pack(value)
    for start in range(0, len(data), PIECE):
        board.set(f"{key}/{start}", data[start : start + PIECE])
    board.set(key, str(len(data)).encode())


def take(board: Board, key: str, *, forget: bool = False) -> Any:
    """Reads a value that has been put. ``forget``: nobody else will want it."""
    parts = [f"{key}/{start}" for start in range(0, int(board.get(key)), PIECE)]
    data = b"".join(map(board.get, parts))
    if forget:
        for part in (*parts, key):
            board.delete_key(part)
    return unpack(data)


def pack(value: Any) -> bytes:
    """A value as bytes."""
    return pickle.dumps(value, protocol=5)


def pack_error(error: BaseException) -> bytes:
    """An error as bytes; of one that others could not read, its name and text."""
    try:
        unpack(data := pack(error))
    except Exception:
        return pack(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def unpack(data: bytes) -> Any:
    """The value. Raises pickle.UnpicklingError at anything but plain values."""
    return _Plain(BytesIO(data)).load()


class _Plain(pickle.Unpickler):
    """Finds nothing but what values are made of."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _ARRAYS:
            return getattr(import_module(module), name)
        if "." not in name and (module == "builtins" or module.startswith("dsv4_quant.")):
            found = getattr(import_module(module), name, None)
            ours = module != "builtins" or _is_error(found)
            if isinstance(found, type) and ours and found.__module__ == module and _is_value(found):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


def _is_value(found: type) -> bool:
    """Data and errors; nothing that does something when it is made, such as opening a file."""
    plain = is_dataclass(found) and "__post_init__" not in vars(found)
    return plain or issubclass(found, tuple | Enum | BaseException)


def _is_error(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, BaseException)
