"""Where the bytes of a stored tensor go when it is split over N GPUs, and how they come together.

A stored tensor is seen as a matrix of R rows of B bytes each (a vector is one row). A *piece* is
the rectangle of it that one rank's file holds; the pieces of a tensor that is not copied to every
rank tile the matrix exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

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


def pieces(tensor: StoredTensor, gpus: int, experts: int) -> Iterator[Piece]:
    """The piece of a tensor on every rank that holds one; ``experts`` is n_routed_experts.

    The GPU count must have passed ``catalogue.check_gpus``.
    """
    rows, row_bytes = geometry(tensor)
    split, shape = tensor.spec.split, tensor.shape
    if split == "expert":
        assert tensor.spec.expert is not None
        rank = tensor.spec.expert // (experts // gpus)
        yield Piece(rank, 0, rows, 0, row_bytes, shape)
        return
    for rank in range(gpus):
        if split is None or gpus == 1:
            yield Piece(rank, 0, rows, 0, row_bytes, shape)
            continue
        part = shape[split] // gpus
        held = (*shape[:split], part, *shape[split + 1 :])
        if split == 0 and len(shape) > 1:
            yield Piece(rank, rank * part, part, 0, row_bytes, held)
        else:  # a slice of every row
            width = part * prod(shape[split + 1 :]) * DTYPE_BITS[tensor.dtype] // 8
            yield Piece(rank, 0, rows, rank * width, width, held)
