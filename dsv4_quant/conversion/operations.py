"""What a step does to a panel of rows, and what it proves on the way.

Every road here is exact or refused: a value that the new format cannot hold stops the conversion
with the tensor and the place named. ``requantise`` has the roads that round. A *tile* is what
shares one scale in the new format.

fp4_to_fp8   the published rule: tile scale = largest of its scales / 2**6, code 8 becomes +0;
             exact iff every non-zero code survives (spread of exponents up to 14)
fp*_to_bf16  decoding; exact unless a value leaves BF16's range or precision
*_to_fp4     1x32 blocks; the smallest power-of-two scale that reaches the largest value
bf16_to_fp8  tiles likewise; how wo_a becomes FP8 again on the way back to hf
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.errors import NotANumberError, ValueNotExactError
from dsv4_quant.formats import bf16, e8m0
from dsv4_quant.formats.blocks import Format, Tensor
from dsv4_quant.kernels.bf16_to_fp4_numba import bf16_to_fp4_exact, fp4_scales_exact
from dsv4_quant.kernels.bf16_to_fp8_numba import bf16_to_fp8_exact, fp8_scales_exact
from dsv4_quant.kernels.fp4_to_bf16_numba import fp4_to_bf16
from dsv4_quant.kernels.fp4_to_fp8_numba import fp4_to_fp8, fp8_scales
from dsv4_quant.kernels.fp8_to_bf16_numba import fp8_to_bf16
from dsv4_quant.kernels.jit_numba import INEXACT, NAN

Codes = NDArray[np.uint8]
Half = NDArray[np.uint16]


@dataclass(slots=True)
class Proof:
    """What the exact cast of one weight found: tiles checked, and the spread of their scales."""

    tiles: int = 0
    spreads: Counter[int] = field(default_factory=Counter)
    worst: tuple[int, int, int] | None = None
    """A spread, and row and column of the first tile that has it; not looked up for all."""

    def add(self, other: Proof) -> None:
        """Takes in what another panel of the weight proved."""
        self.tiles += other.tiles
        self.spreads += other.spreads
        if self.worst is None or (other.worst is not None and _worse(other.worst, self.worst)):
            self.worst = other.worst

    def to_json(self) -> list[Any]:
        """For the journal."""
        return [self.tiles, sorted(self.spreads.items()), self.worst]

    @classmethod
    def from_json(cls, value: Any) -> Proof:
        """The inverse of to_json."""
        tiles, spreads, worst = value
        return cls(tiles, Counter(dict(spreads)), worst and tuple(worst))


def _worse(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return (-a[0], a[1:]) < (-b[0], b[1:])


@dataclass(frozen=True, slots=True)
class Panel:
    """Whole rows of a weight. ``first_row`` is a multiple of all blocks' rows."""

    name: str
    first_row: int
    tensor: Tensor
    after: Format


def weight(operation: str, panel: Panel, proof: Proof) -> NDArray[Any]:
    """The codes of the output rows, ``[rows, bytes]`` or a typed view of them."""
    return _WEIGHT[operation](panel, proof)


def scale(operation: str, panel: Panel) -> NDArray[Any]:
    """The scales of the output rows, ``[block rows, block columns]``."""
    return _SCALE[operation](panel)


def _fp4_to_fp8(panel: Panel, proof: Proof) -> Codes:
    tensor, (b, c) = panel.tensor, _block(panel.after)
    scales = _fp8_scales(panel)
    out = np.empty(_shape(tensor), np.uint8)
    spreads, result = np.zeros(256, np.int64), np.zeros(5, np.int64)
    assert tensor.format.block is not None
    group = tensor.format.block[1]
    bad = fp4_to_fp8(tensor.codes, _scales(tensor), scales, group, b, c, out, spreads, result)
    if bad:
        tile_row, tile_col, _, least, most = (int(value) for value in result[:5])
        if most == 0xFF:
            refuse_nan(panel, panel.first_row + tile_row * b, tile_col * c)
        _not_exact(
            panel,
            panel.first_row + tile_row * b,
            tile_col * c,
            f"its 1x{group} scales lie 2**{most - least} apart (bytes {least}..{most}), too far for"
            f" one FP8 scale"
            if most >= 6
            else f"its largest scale byte, {most}, needs an FP8 scale below 2**-127",
        )
    proof.tiles += scales.size
    proof.spreads.update({int(s): int(spreads[s]) for s in np.flatnonzero(spreads)})
    return out


def _fp8_scales(panel: Panel) -> Codes:
    (b, c), (rows, cols) = _block(panel.after), _shape(panel.tensor)
    assert panel.tensor.format.block is not None
    group = panel.tensor.format.block[1]
    out = np.empty((-(-rows // b), -(-cols // c)), np.uint8)
    fp8_scales(_scales(panel.tensor), group, b, c, out)
    return out


def _to_bf16(panel: Panel, proof: Proof | None = None) -> Half:
    """Decoding of FP4 or FP8; BF16 passes through."""
    tensor = panel.tensor
    if tensor.format.kind == "bf16":
        return tensor.codes
    out = np.empty(_shape(tensor), np.uint16)
    b, c = _block(tensor.format)
    if tensor.format.kind == "fp4":
        flags = fp4_to_bf16(tensor.codes, _scales(tensor), c, out)
    else:
        flags = fp8_to_bf16(tensor.codes, _scales(tensor), 0, b, c, out)
    if flags & (NAN | INEXACT):
        _explain_bf16(panel)
    return out


def _explain_bf16(panel: Panel) -> NoReturn:
    """Finds the first value that is NaN or does not fit in BF16."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = panel.tensor.decode()
    nan = np.argwhere(np.isnan(values))
    if len(nan):
        refuse_nan(panel, panel.first_row + int(nan[0][0]), int(nan[0][1]))
    lost = np.argwhere(~(bf16.is_exact(values) & np.isfinite(values)))
    if len(lost):
        row, col = map(int, lost[0])
        _not_exact(panel, panel.first_row + row, col, _beyond(values[row, col]))
    tile = np.argwhere(np.abs(_scales(panel.tensor)) < np.finfo(np.float32).tiny)[0]
    b, c = _block(panel.tensor.format)
    row, col = int(tile[0]) * b, int(tile[1]) * c
    _not_exact(panel, panel.first_row + row, col, "a scale so small that float32 loses the product")


def _beyond(value: np.float32) -> str:
    if np.isinf(value):
        return "it is beyond the range of BF16"
    return f"{value} is not in BF16"


def _to_fp4(panel: Panel, proof: Proof) -> Codes:
    half, group = _to_bf16(panel), _block(panel.after)[1]
    rows, cols = half.shape
    scales, out = np.empty((rows, cols // group), np.uint8), np.empty((rows, cols // 2), np.uint8)
    at = np.zeros(3, np.int64)
    _check_codes(panel, bf16_to_fp4_exact(half, group, scales, out, at), at)
    proof.tiles += scales.size
    return out


def _fp4_scales(panel: Panel) -> Codes:
    half, group = _to_bf16(panel), _block(panel.after)[1]
    out, at = np.empty((half.shape[0], half.shape[1] // group), np.uint8), np.zeros(3, np.int64)
    _check_codes(panel, fp4_scales_exact(half, group, out, at), at)
    return out


def _to_fp8(panel: Panel, proof: Proof) -> Codes:
    half, (b, c) = _to_bf16(panel), _block(panel.after)
    scales = np.empty(panel.after.scale_shape(half.shape), np.uint8)
    out, at = np.empty(half.shape, np.uint8), np.zeros(3, np.int64)
    _check_codes(panel, bf16_to_fp8_exact(half, b, c, scales, out, at), at)
    proof.tiles += scales.size
    return out


def _to_fp8_scales(panel: Panel) -> NDArray[Any]:
    half, (b, c) = _to_bf16(panel), _block(panel.after)
    out, at = np.empty(panel.after.scale_shape(half.shape), np.uint8), np.zeros(3, np.int64)
    _check_codes(panel, fp8_scales_exact(half, b, c, out, at), at)
    return e8m0.VALUES[out] if panel.after.scale == "f32" else out


def _check_codes(panel: Panel, flags: int, at: NDArray[np.int64]) -> None:
    """Refuses what an exact encoder could not hold; ``at``: row, column, BF16 bits of a value."""
    row, col = panel.first_row + int(at[0]), int(at[1])
    if flags & NAN:
        refuse_nan(panel, row, col)
    if flags & INEXACT:
        b, c = _block(panel.after)
        value = bf16.decode(np.array([at[2]], np.uint16))[0]
        why = f"{value:g} is not on the grid that reaches the tile's largest value"
        _not_exact(panel, row // b * b, col // c * c, why)


def _not_exact(panel: Panel, row: int, col: int, why: str) -> NoReturn:
    rows, cols = panel.after.block or (1, 1)
    place = f"row {row}, column {col}" if (rows, cols) == (1, 1) else (
        f"the {rows}x{cols} tile at row {row}, column {col} (tile {row // rows}, {col // cols})"
    )  # fmt: skip
    raise ValueNotExactError(
        f"{panel.tensor.format} to {panel.after} would change a value in {place}: {why}",
        tensor=panel.name,
        hint=f"No output was made. {_way_out(panel)}",
    )


def _way_out(panel: Panel) -> str:
    """What keeps every value of a weight that its new format cannot hold."""
    if panel.name.endswith("attn.wo_a.weight") and panel.after.kind == "bf16":
        return "The mp layout holds wo_a in BF16; --layout hf keeps it as it is."
    if panel.name.endswith("attn.wo_a.weight"):
        return (
            "The mp layout holds it in BF16, and these values were never FP8: `dsv4-quant convert`"
            " with --layout hf --lossy rounds them, with --dense bf16 decodes the others."
        )
    if panel.after.kind == "bf16":
        return "Leave its format as it is: --experts keep, and no --dense bf16."
    if ".experts." not in panel.name:
        return "--dense keep leaves it as it is; --lossy rounds and tells what that costs."
    return (
        "--experts keep leaves the codes as they are, --experts bf16 decodes them; --lossy rounds"
        " and tells what that costs."
    )


def refuse_nan(panel: Panel, row: int, col: int) -> NoReturn:
    """Raises NotANumberError: there is nothing that such a value could become."""
    raise NotANumberError(
        f"A NaN (or infinity, or a scale of 0xFF) at row {row}, column {col}",
        tensor=panel.name,
        hint="The file is damaged, or was written by a broken tool; fetch it again.",
    )


def _block(form: Format) -> tuple[int, int]:
    assert form.block is not None
    return form.block


def _scales(tensor: Tensor) -> NDArray[Any]:
    assert tensor.scales is not None
    return tensor.scales


def _shape(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of values."""
    return tensor.codes.shape[0], tensor.shape[1]


def _copy(panel: Panel, proof: Proof) -> NDArray[Any]:
    return panel.tensor.codes


_WEIGHT: dict[str, Callable[[Panel, Proof], NDArray[Any]]] = {
    "copy": _copy,
    "fp4_to_fp8": _fp4_to_fp8,
    "fp4_to_bf16": _to_bf16,
    "fp8_to_bf16": _to_bf16,
    "fp8_to_fp4": _to_fp4,
    "bf16_to_fp4": _to_fp4,
    "bf16_to_fp8": _to_fp8,
}
_SCALE: dict[str, Callable[[Panel], NDArray[Any]]] = {
    "fp4_to_fp8": _fp8_scales,
    "fp8_to_fp4": _fp4_scales,
    "bf16_to_fp4": _fp4_scales,
    "bf16_to_fp8": _to_fp8_scales,
}
