"""A large array in a few numbers: a hash, a norm, and a sketch that tells how far two are apart.

The sketch (Charikar, Chen, Farach-Colton 2002: count sketch) gives every value of the array a
random sign and adds the values up in BUCKETS sums; value i of a row goes to sum i mod BUCKETS. For
two arrays the sum over the buckets of (difference of sums)**2 has the squared distance of the
arrays as its mean, and sqrt(2 / BUCKETS) of that as its deviation: it gives a distance to within
a factor of two or so, from four numbers, without the arrays.

Signs are bits of PCG64's raw stream, lowest first, 1 for minus; a row takes whole 64-bit words.
Sums are in float64, over the rows in their order, then over the columns of a bucket in theirs. So a
digest is the same on every machine for the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dsv4_quant.kernels.jit_numba import U64, kernel

BUCKETS = 4
SEED = 1
CHUNK = 1 << 20
"""Values whose signs are held at a time."""

WORD = 64
"""Signs in a word of the stream."""

ROW_BYTES = 2
"""Of a row's hash: enough to say that it changed, one in 65,536 times wrong."""

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Digest:
    """An array of floats: what bits it has (32 hex digits), how large it is, where it lies."""

    hash: str
    norm: float
    sketch: tuple[float, ...]


class Digester:
    """The digest of rows ``[t, n]`` that come some at a time, in their order."""

    def __init__(self, columns: int) -> None:
        self._words = -(-columns // WORD)
        self._sums, self._squares = np.zeros(self._words * WORD), np.zeros(self._words * WORD)
        self._stream = np.random.PCG64(SEED)
        self._hash = blake3()

    def add(self, rows: Floats) -> None:
        """The next rows."""
        rows = np.ascontiguousarray(rows, "<f4")
        self._hash.update(rows.reshape(-1).view(np.uint8).data)
        step = max(1, CHUNK // rows.shape[1])
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            signs = self._stream.random_raw(len(some) * self._words).reshape(-1, self._words)
            _add(some, signs, self._sums, self._squares)

    def digest(self) -> Digest:
        """Of the rows so far. The norm is not finite if any value is not."""
        buckets = self._sums.reshape(-1, BUCKETS)
        return Digest(
            hash=str(self._hash.hexdigest(length=16)),
            norm=_short(math.sqrt(float(np.cumsum(self._squares)[-1]))),
            sketch=tuple(map(_short, np.cumsum(buckets, axis=0)[-1].tolist())),
        )


def digest(rows: Floats) -> Digest:
    """The digest of ``[t, n]``. The norm is not finite if any value is not."""
    digester = Digester(rows.shape[1])
    digester.add(rows)
    return digester.digest()


@kernel
def _add(rows: Floats, signs: NDArray[np.uint64], sums: Doubles, squares: Doubles) -> None:
    """``sums[i] += sign[t, i] * rows[t, i]`` and ``squares[i] += rows[t, i]**2``, t ascending."""
    columns = rows.shape[1]
    for t in range(rows.shape[0]):
        for w in range(signs.shape[1]):
            word, first = signs[t, w], WORD * w
            for k in range(min(WORD, columns - first)):
                x = np.float64(rows[t, first + k])
                sums[first + k] += -x if (word >> U64(k)) & U64(1) else x
                squares[first + k] += x * x


def _short(value: float) -> float:
    """Eight significant digits: JSON then holds the very number."""
    return float(f"{value:.8g}")


def row_hashes(rows: Floats) -> bytes:
    """The first bytes of every row's BLAKE3, joined."""
    return b"".join(blake3(row.tobytes()).digest(length=ROW_BYTES) for row in rows)


def distance(one: Sequence[Digest], other: Sequence[Digest]) -> float:
    """Estimated distance of two lists of arrays, as a part of the first one's length."""
    apart = sum(
        (a - b) ** 2
        for mine, theirs in zip(one, other, strict=True)
        for a, b in zip(mine.sketch, theirs.sketch, strict=True)
    )
    size = sum(mine.norm**2 for mine in one)
    return math.sqrt(apart / size) if size else math.sqrt(apart)
