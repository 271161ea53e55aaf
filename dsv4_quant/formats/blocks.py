"""A weight and how it is stored: codes, scales, and the geometry that ties them together.

R rows and C columns of the tensor; a block of b x c values shares one scale.

kind  codes on disk                    scale
fp4   uint8, two codes per byte [R, C/2]   E8M0 byte per 1 x 32            [R, C/32]
fp8   uint8, one code per byte  [R, C]     E8M0 byte or F32 per b x c      [ceil(R/b), ceil(C/c)]
bf16  uint16, f32 float32, i64 int64       none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import bf16, e2m1, e4m3, e8m0

Kind = Literal["fp4", "fp8", "bf16", "f32", "i64"]
ScaleKind = Literal["e8m0", "f32"]

BITS: dict[Kind, int] = {"fp4": 4, "fp8": 8, "bf16": 16, "f32": 32, "i64": 64}
"""Bits per value, scales not counted."""

CODES: dict[Kind, type[np.generic]] = {
    "fp4": np.uint8,
    "fp8": np.uint8,
    "bf16": np.uint16,
    "f32": np.float32,
    "i64": np.int64,
}
SCALES: dict[ScaleKind, type[np.generic]] = {"e8m0": np.uint8, "f32": np.float32}


@dataclass(frozen=True, slots=True)
class Format:
    """How values are stored: the element, and for quantised kinds the block and its scale."""

    kind: Kind
    block: tuple[int, int] | None = None
    scale: ScaleKind | None = None

    @property
    def is_quantised(self) -> bool:
        """Whether a second tensor, the scales, belongs to the codes."""
        return self.scale is not None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scales of a tensor ``[R, C]``; ragged edges have a block of their own."""
        assert self.block is not None
        (rows, cols), (b, c) = shape, self.block
        return -(-rows // b), -(-cols // c)

    def __str__(self) -> str:
        """Such as ``fp8 128x128 e8m0`` or ``bf16``."""
        if self.block is None:
            return self.kind
        return f"{self.kind} {self.block[0]}x{self.block[1]} {self.scale}"


FP4 = Format("fp4", (1, 32), "e8m0")
BF16 = Format("bf16")
F32 = Format("f32")
I64 = Format("i64")


def fp8(block: tuple[int, int], scale: ScaleKind = "e8m0") -> Format:
    """E4M3 codes with one scale per block."""
    return Format("fp8", block, scale)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One logical weight: never two loose tensors.

    shape is logical (what the model sees); codes and scales are as in the module's table.
    """

    format: Format
    shape: tuple[int, ...]
    codes: NDArray[Any]
    scales: NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on disk, scales included."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def decode(self) -> NDArray[np.float32]:
        """The values, float32 ``shape``. Integers are not weights: a TypeError for i64.

        Quantised values are code times scale in float32, exact for power-of-two scales unless the
        product leaves float32's range and becomes infinite, or NaN, which is left to see.
        """
        if self.format.kind == "i64":
            raise TypeError("an integer table has no float values")
        if self.format.kind == "f32":
            return np.asarray(self.codes, np.float32)
        if self.format.kind == "bf16":
            return bf16.decode(self.codes)
        if self.format.kind == "fp4":
            values = e2m1.VALUES[e2m1.unpack(self.codes)]
        else:
            values = e4m3.VALUES[self.codes]
        with np.errstate(over="ignore", invalid="ignore"):
            return values * self._spread_scales()

    def _spread_scales(self) -> NDArray[np.float32]:
        """One float32 scale per value."""
        assert self.scales is not None and self.format.block is not None
        values = e8m0.VALUES[self.scales] if self.format.scale == "e8m0" else self.scales
        (rows, cols), (b, c) = self.shape, self.format.block
        spread = np.repeat(np.repeat(values, b, axis=0)[:rows], c, axis=1)[:, :cols]
        return np.asarray(spread, np.float32)
