"""What ``--lossy`` does to a panel of rows: round what the new format cannot hold, and count it.

Values that the new format holds come out as they are, so a weight that was in that format before
comes back, and a conversion that would have been exact is the same with ``--lossy``. fp4_to_fp8
keeps the published rule wherever a tile is exact under it, so such tiles are the published
converter's, byte for byte; only the others get their scales by the rule that was asked for.

NaN and infinities are refused here too: there is nothing to round them to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.conversion.operations import Panel, refuse_nan
from dsv4_quant.errors import NotANumberError
from dsv4_quant.formats import e8m0
from dsv4_quant.formats.blocks import Tensor
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.figures import Figures
from dsv4_quant.kernels.fp4_to_bf16_numba import fp4_to_bf16
from dsv4_quant.kernels.fp4_to_fp8_numba import fp4_to_fp8, fp8_scales
from dsv4_quant.kernels.fp8_to_bf16_numba import fp8_to_bf16
from dsv4_quant.kernels.fp8_to_f32_numba import fp8_to_f32
from dsv4_quant.kernels.jit_numba import INEXACT, NAN
from dsv4_quant.kernels.quantise_fp4_numba import quantise_fp4
from dsv4_quant.kernels.quantise_fp8_numba import quantise_fp8

Array = NDArray[Any]

LARGE_SCALE = {"fp4": 126 + e8m0.BIAS, "fp8": 120 + e8m0.BIAS}
"""From these scale bytes on a code can stand for 2**128: FP4's 4 and 6, FP8's 256 to 448."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Rows of a weight in their new format, and what that cost."""

    tensor: Tensor
    figures: Figures
    moved: int = 0
    """Rows that took other codes than the nearest (``calibrated``)."""


def requantise(panel: Panel, rule: ScaleRule) -> Rounded:
    """Codes, scales and cost. Raises NotANumberError with the place of a NaN or infinity."""
    values, after = _values(panel), panel.after
    rows, cols = values.shape
    at = np.zeros(3, np.int64)
    if after.kind == "bf16":
        from dsv4_quant.kernels.round_bf16_numba import round_bf16

        figures, half = Figures.empty(rows), np.empty((rows, cols), np.uint16)
        _check(panel, round_bf16(values, half, figures, at), at)
        return Rounded(Tensor(after, (rows, cols), half), figures)
    scales = np.empty(after.scale_shape((rows, cols)), np.uint8)
    figures = Figures.empty(len(scales))
    codes = np.empty((rows, cols // 2 if after.kind == "fp4" else cols), np.uint8)
    _quantise(panel, values, rule, scales, codes, figures)
    if panel.tensor.format.kind == "fp4":
        _keep_exact_tiles(panel, codes, scales)
        figures.scales[:] = np.bincount(scales.reshape(-1), minlength=256)
    held = e8m0.VALUES[scales] if after.scale == "f32" else scales
    made = Tensor(after, (rows, cols), codes, held)
    _check_range(panel, made, scales)
    return Rounded(made, figures)


def _check_range(panel: Panel, made: Tensor, scales: Array) -> None:
    """Refuses what rounds to 2**128: no float32 or BF16 reader could hold it."""
    limit = LARGE_SCALE["fp4" if made.format.kind == "fp4" else "fp8"]
    if scales.max(initial=0) < limit:
        return
    beyond = np.argwhere(~np.isfinite(made.decode()))
    if len(beyond):
        row, col = map(int, beyond[0])
        raise NotANumberError(
            f"The value at row {panel.first_row + row}, column {col} rounds to 2**128 or more,"
            " which float32 and BF16 cannot hold",
            tensor=panel.name,
            hint="No weight of this model is as large: the file is damaged.",
        )


def rounded_scales(panel: Panel, rule: ScaleRule) -> Array:
    """The scales alone: they stand before the codes in a file, so they are made before them."""
    if panel.tensor.format.kind == "fp4":  # whether a tile is exact depends on its codes
        scales = requantise(panel, rule).tensor.scales
        assert scales is not None
        return scales
    values = _values(panel)
    scales = np.empty(panel.after.scale_shape(values.shape), np.uint8)
    _quantise(panel, values, rule, scales, None, None)
    return e8m0.VALUES[scales] if panel.after.scale == "f32" else scales


def _quantise(
    panel: Panel,
    values: Array,
    rule: ScaleRule,
    scales: Array,
    codes: Array | None,
    figures: Figures | None,
) -> None:
    assert panel.after.block is not None
    b, c = panel.after.block
    at = np.zeros(3, np.int64)
    if panel.after.kind == "fp4":
        status = quantise_fp4(values, rule, c, scales, codes, figures, at)
    else:
        status = quantise_fp8(values, rule, b, c, scales, codes, figures, at)
    _check(panel, status, at)


def _check(panel: Panel, status: int, at: NDArray[np.int64]) -> None:
    if status:
        refuse_nan(panel, panel.first_row + int(at[0]), int(at[1]))


def _values(panel: Panel) -> Array:
    """The values of a panel: BF16 bits where they hold all of it, else float32."""
    tensor = panel.tensor
    kind, codes, scales = tensor.format.kind, tensor.codes, tensor.scales
    if kind == "bf16":
        return codes
    assert scales is not None and tensor.format.block is not None
    b, c = tensor.format.block
    shape = (codes.shape[0], tensor.shape[1])
    half = np.empty(shape, np.uint16)
    flags = INEXACT
    if kind == "fp4":
        flags = fp4_to_bf16(codes, scales, c, half)
    elif tensor.format.scale == "e8m0":
        flags = fp8_to_bf16(codes, scales, 0, b, c, half)
    if not flags & (INEXACT | NAN):
        return half
    if kind == "fp4":
        return tensor.decode()
    values = np.empty(shape, np.float32)
    fp8_to_f32(codes, scales, 0, b, c, values)
    return values


def _keep_exact_tiles(panel: Panel, codes: Array, scales: Array) -> None:
    """Tiles that the published rule casts exactly are cast by it, scale included."""
    tensor, block = panel.tensor, panel.after.block
    assert tensor.format.block is not None and tensor.scales is not None and block is not None
    group, (b, c) = tensor.format.block[1], block
    if _published(tensor.codes, tensor.scales, group, block, codes, scales):
        return
    for i in range(scales.shape[0]):
        rows = slice(i * b, (i + 1) * b)
        for j in range(scales.shape[1]):
            held = np.ascontiguousarray(tensor.codes[rows, j * c // 2 : (j + 1) * c // 2])
            by = np.ascontiguousarray(tensor.scales[rows, j * c // group : (j + 1) * c // group])
            tile = np.empty((held.shape[0], 2 * held.shape[1]), np.uint8)
            scale = np.empty((1, 1), np.uint8)
            if _published(held, by, group, block, tile, scale):
                codes[rows, j * c : (j + 1) * c], scales[i, j] = tile, scale[0, 0]


def _published(
    held: Array, by: Array, group: int, block: tuple[int, int], codes: Array, scales: Array
) -> bool:
    """Writes what the published converter would, if that is exact; else leaves all as it is."""
    made, made_scales = np.empty_like(codes), np.empty_like(scales)
    fp8_scales(by, group, *block, made_scales)
    spreads, result = np.zeros(256, np.int64), np.zeros(5, np.int64)
    if fp4_to_fp8(held, by, made_scales, group, *block, made, spreads, result):
        return False
    codes[...], scales[...] = made, made_scales
    return True
