"""A large array in a few numbers: a hash, a norm, and a sketch that tells how far two are apart.

The sketch (Charikar, Chen, Farach-Colton 2002: count sketch) gives every value of the array a
random sign and adds the values up in BUCKETS sums; value i of a row goes to sum i mod BUCKETS. For
two arrays the sum over the buckets of (difference of sums)**2 has the squared distance of the
arrays as its mean, and sqrt(2 / BUCKETS) of that as its deviation: it gives a distance to within
a factor of two or so, from four numbers, without the arrays.

Signs are bits of PCG64's raw stream, lowest first, 1 for minus; a row takes whole 64-bit words.
Sums are in float64: over rows in their order, then over the columns of a bucket in theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

BUCKETS = 4
SEED = 1
CHUNK = 1 << 20
"""Values that are worked on at a time."""

ROW_BYTES = 2
"""Of a row's hash: enough to say that it changed, one in 65,536 times wrong."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Digest:
    """An array of floats: what bits it has (32 hex digits), how large it is, where it lies."""

    hash: str
    norm: float
    sketch: tuple[float, ...]


def digest(rows: Floats) -> Digest:
    """The digest of ``[t, n]``. norm and sketch are not finite if any value is not."""
    columns = rows.shape[1]
    words = -(-columns // 64)
    stream = np.random.PCG64(SEED)
    sums, squares = np.zeros(columns), np.zeros(columns)
    step = max(1, CHUNK // columns)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        drawn = stream.random_raw(len(some) * words).astype("<u8", copy=False)
        bits = np.unpackbits(drawn.view(np.uint8), bitorder="little").reshape(len(some), -1)
        flips = bits[:, :columns].astype(np.uint32) << np.uint32(31)
        signed = (some.view(np.uint32) ^ flips).view(np.float32)
        with np.errstate(invalid="ignore"):  # infinities may meet; the norm tells
            sums += signed.sum(axis=0, dtype=np.float64)
        squares += np.square(some, dtype=np.float64).sum(axis=0)
    return Digest(
        hash=array_hash(rows),
        norm=_short(math.sqrt(float(_in_order(squares, 1)[0]))),
        sketch=tuple(_short(float(value)) for value in _in_order(sums, BUCKETS)),
    )


def _in_order(values: NDArray[np.float64], buckets: int) -> NDArray[np.float64]:
    """Sums of the values i, i + buckets, i + 2 buckets, ...: one after the other."""
    padded = np.zeros(-(-len(values) // buckets) * buckets)
    padded[: len(values)] = values
    with np.errstate(invalid="ignore"):
        total: NDArray[np.float64] = np.cumsum(padded.reshape(-1, buckets), axis=0)[-1]
    return total


def _short(value: float) -> float:
    """Eight significant digits: JSON then holds the very number."""
    return float(f"{value:.8g}")


def array_hash(rows: Floats) -> str:
    """BLAKE3 of the values as they lie in memory, row by row: 32 hex digits of it."""
    data = memoryview(np.ascontiguousarray(rows, "<f4")).cast("B")
    return str(blake3(data, max_threads=blake3.AUTO).hexdigest(length=16))


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
