"""Where the bytes of a stored tensor go when it is split over N GPUs, and how they come together.

A stored tensor is seen as a matrix of R rows of B bytes each (a vector is one row). A *piece* is
the rectangle of it that one rank's file holds; the pieces of a tensor that is not copied to every
rank tile the matrix exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from dsv4_quant.catalogue import DTYPE_BITS, StoredTensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [row, row + rows) and bytes [column, column + row_bytes) of each, on one rank."""

    rank: int
    row: int
    rows: int
    column: int
    row_bytes: int
    shape: tuple[int, ...]
    """The shape in that rank's header."""

    @property
    def nbytes(self) -> int:
        """Bytes of the piece."""
        return self.rows * self.row_bytes


def geometry(tensor: StoredTensor) -> tuple[int, int]:
    """Rows and bytes per row of a stored tensor, whole."""
    rows = 1 if len(tensor.shape) == 1 else tensor.shape[0]
    return rows, tensor.nbytes // rows


def pieces(tensor: StoredTensor, gpus: int, experts: int) -> tuple[Piece, ...]:
    """The piece of a tensor on every rank that holds one; ``experts`` is n_routed_experts.

    The GPU count must have passed ``catalogue.check_gpus``.
    """
    split = tensor.spec.split
    if split != "expert":
        return _cut(tensor.dtype, tensor.shape, split, gpus)
    assert tensor.spec.expert is not None
    rank = tensor.spec.expert // (experts // gpus)
    return _cut(tensor.dtype, tensor.shape, None, 1, rank)


@lru_cache(maxsize=1 << 14)  # a checkpoint has a few hundred kinds of tensors, and 145,116 tensors
def _cut(
    dtype: str, shape: tuple[int, ...], split: Literal[0, 1] | None, gpus: int, first: int = 0
) -> tuple[Piece, ...]:
    """A piece for each of so many ranks from the first on; without a split the whole tensor."""
    rows = 1 if len(shape) == 1 else shape[0]
    row_bytes = prod(shape) * DTYPE_BITS[dtype] // 8 // rows
    if split is None or gpus == 1:
        return tuple(Piece(first + rank, 0, rows, 0, row_bytes, shape) for rank in range(gpus))
    part = shape[split] // gpus
    held = (*shape[:split], part, *shape[split + 1 :])
    if split == 0 and len(shape) > 1:
        return tuple(Piece(rank, rank * part, part, 0, row_bytes, held) for rank in range(gpus))
    width = part * prod(shape[split + 1 :]) * DTYPE_BITS[dtype] // 8  # a slice of every row
    return tuple(Piece(rank, 0, rows, rank * width, width, held) for rank in range(gpus))
