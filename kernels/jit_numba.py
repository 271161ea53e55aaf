"""How the CPU casts are compiled, what they take and what they answer.

The casts of the conversion path work on *panels*: some rows of a tensor, small enough for the L2
cache, C-contiguous, in buffers that the caller owns and uses again. They are compiled by numba,
release the GIL, allocate nothing of a panel's size, and answer with a number instead of raising:
what they meet in the data is the caller's to name. A wrong shape or dtype is a ValueError.

Two rules keep them fast and readable:

- Several codes lie side by side in one 64-bit word and are worked on at once; masks keep them
  apart. numba widens every smaller integer to 64 bits anyway, and LLVM turns a loop over words
  into AVX2 or AVX-512 by itself. Such a word is little-endian, like the files.
- The loop over words serves the ordinary scales, where no bit can overflow into a neighbour. The
  rest of the 256 scale bytes goes through tables or float64, exact and slow.

numba compiles again when a kernel's own file changes, not when another one does. So kernels take
tables as arguments, and share nothing between files but the few constants below.

Compiled code is kept in ``__pycache__`` beside the source, or in the user's cache folder where
that cannot be written (``NUMBA_CACHE_DIR`` names another). Where neither can be written, or what
lies there cannot be read, the casts still work; every process then compiles for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np

P = ParamSpec("P")
T = TypeVar("T")

INEXACT = 1
"""Flag: some value does not exist in the output format; what was written is the nearest one."""

NAN = 2
"""Flag: a NaN was met, as a code, a scale or a value."""

U64 = np.uint64
I64 = cast(type[int], np.int64)
"""numba makes a float of a signed and an unsigned integer; this makes them all signed."""


def kernel(function: Callable[P, T]) -> Callable[P, T]:
    """An entry point, compiled at its first call; from the cache where there is one."""
    found: tuple[Callable[P, T], Callable[P, T]] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal found
        if found is None:
            with _ONE_AT_A_TIME:
                found = found or _compilers(function)
        compiled, plain = found
        try:
            return compiled(*args, **kwargs)
        except Exception:  # a full disk, a torn cache file; kernels themselves raise nothing
            found = plain, plain
            return plain(*args, **kwargs)

    return call


def part(function: Callable[P, T]) -> Callable[P, T]:
    """A piece of a kernel in the same file, called once per row or so."""
    return cast(Callable[P, T], _Piece(function, {}))


def inline(function: Callable[P, T]) -> Callable[P, T]:
    """A piece of a kernel in the same file that stands in an inner loop."""
    return cast(Callable[P, T], _Piece(function, {"forceinline": True}))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Stands for a function until a kernel of its file is called."""

    function: Callable[..., Any]
    options: dict[str, Any]


_ONE_AT_A_TIME = Lock()


def _compilers(function: Callable[P, T]) -> tuple[Callable[P, T], Callable[P, T]]:
    """The function that compiles itself when it is called: with a cache, and without one.

    numba looks for what it calls among the names of its file, so the pieces there take their
    final form first. It is imported here and not above because that takes a third of a second,
    and many commands import kernels that they never call.
    """
    from numba import njit

    names = function.__globals__
    for name, piece in list(names.items()):
        if isinstance(piece, _Piece):
            names[name] = njit(nogil=True, **piece.options)(piece.function)
    plain = njit(nogil=True)(function)
    try:
        return njit(nogil=True, cache=True)(function), plain
    except RuntimeError:  # numba found no folder to keep a cache in
        return plain, plain


def expect(name: str, array: np.ndarray[Any, Any], dtype: type, shape: tuple[int, ...]) -> None:
    """A compiled loop does not look where it reads and writes, so look first."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be a C-contiguous {np.dtype(dtype)} {list(shape)}, "
            f"not a {array.dtype} {list(array.shape)} with strides {list(array.strides)}"
        )


def ceil_div(a: int, b: int) -> int:
    """How many blocks of b cover a."""
    return -(-a // b)
