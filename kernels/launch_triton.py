"""What the launches of the twins share: tile sizes, and constants as bits."""

from __future__ import annotations

import struct

import triton

OPTIONS = {"enable_fp_fusion": False}
"""Launch options: ``a * b + c`` stays two roundings, as in the definitions, whatever the version
of Triton takes for granted."""

TILE = 4096
"""Elements that one program of an elementwise kernel handles: 32 for each of its 128 threads."""


def tile_rows(rows: int, lanes: int) -> int:
    """Rows of a tile that is ``lanes`` wide: a power of two, no more than there are."""
    return min(int(triton.next_power_of_2(rows)), max(1, TILE // lanes))


def float_bits(value: float) -> int:
    """The bits of a positive float32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)


def fold_groups(rows: int, cols: int, group: int) -> tuple[int, int]:
    """``[R, C]`` as rows of one group each, where groups fill the rows: then a tile is one run
    of memory, whatever the width of a group. Otherwise ``[R, C]`` as it is."""
    return (rows * (cols // group), group) if cols % group == 0 else (rows, cols)


DOT_MIN = 16
"""The least size of each side of a matrix product in Triton."""

DOT_MAX = 64
"""The largest tile side that a matrix product is cut into."""


def dot_tile(size: int) -> int:
    """A tile side for ``size`` rows: a power of two from DOT_MIN to DOT_MAX."""
    return min(DOT_MAX, max(DOT_MIN, int(triton.next_power_of_2(size))))
