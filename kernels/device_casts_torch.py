"""The weight casts on another device, for panels in host memory.

The same codes, scales and figures as the CPU casts give, byte for byte. What is out of the
ordinary is not told apart here: wherever a value is not exact that must be, or is no number, the
answer is None, and the CPU cast of the same panel says what is wrong and where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsv4_quant.formats import e8m0
from dsv4_quant.formats.blocks import Format
from dsv4_quant.formats.blocks import Tensor as Weight
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels import ops
from dsv4_quant.kernels.blocks_torch import spread_blocks
from dsv4_quant.kernels.figures import EXACT, FLUSHED, SATURATED, Figures
from dsv4_quant.kernels.lane_torch import Array, Hints, Lane
from dsv4_quant.kernels.quantised_torch import Quantised
from dsv4_quant.kernels.verdicts import EXACT as EXACT_TILE

HINTS = Hints(
    full="Take fewer --workers or less --max-memory, or --device cpu; the same command then"
    " continues.",
    failed="Run the same command again, or with --device cpu: it continues from there.",
)


class DeviceCasts:
    """The casts of one thread.

    A weight's codes are ``[R, C]`` (FP4: ``[R, C / 2]``), its scales ``[h, w]``; a panel begins at
    the first row of a block of every format. Raises DeviceError where the device fails.
    """

    def __init__(self, device: torch.device) -> None:
        self._lane = Lane(device, HINTS)

    def fp4_to_fp8(self, held: Weight, after: Format) -> tuple[Array, Counter[int]] | None:
        """Codes, and how many tiles have which spread of scale bytes; blocks of zeros aside."""

        def cast(codes: Tensor, scales: Tensor) -> Sequence[Tensor]:
            made = ops.fp4_to_fp8(codes, scales, held.format, after)
            return made.codes, made.verdicts, made.low, made.high

        codes, verdicts, low, high = self._lane.run(cast, *_parts(held))
        if (verdicts != EXACT_TILE).any():
            return None
        spreads = np.maximum(high.astype(np.int64) - low, 0)  # a tile of zeros: 0 - 255
        return codes, Counter(spreads.reshape(-1).tolist())

    def to_bf16(self, held: Weight) -> Array | None:
        """The values of FP4 or FP8 as BF16 bits ``[R, C]``."""
        half, flags = self._lane.run(lambda *parts: _decoded(held.format, *parts), *_parts(held))
        return None if flags.any() else half

    def encode(self, held: Weight, after: Format) -> tuple[Array, Array] | None:
        """Codes and E8M0 scales of BF16 or FP8 as FP4 or FP8.

        The largest power of two that a block may need holds it, if any does (``bf16_to_fp4_numba``,
        ``bf16_to_fp8_numba``): so ScaleRule.MAX without an error is the exact cast.
        """

        def cast(*parts: Tensor) -> Sequence[Tensor]:
            values, flags = _decoded(held.format, *parts)
            made = _quantised(values, after, ScaleRule.MAX)
            lost = (made.error_squares != 0) | (made.scales == e8m0.NAN)
            return made.codes, made.scales, lost.any().int() | flags

        codes, scales, lost = self._lane.run(cast, *_parts(held))
        return None if lost.any() else (codes, scales)

    def quantise(
        self, held: Weight, after: Format, rule: ScaleRule
    ) -> tuple[Array, Array, Figures] | None:
        """Codes and E8M0 scales of any weight as FP4 or FP8, and what that cost.

        Of FP4 the tiles that the published rule casts exactly are cast by it.
        """

        def cast(codes: Tensor, scales: Tensor | None = None) -> Sequence[Tensor]:
            values, flags = _decoded(held.format, codes, scales, rounded=True)
            made = _quantised(values, after, rule)
            if held.format.kind == "fp4":
                assert scales is not None
                made = _keep_exact_tiles(made, codes, scales, held.format, after)
            return flags, *made

        flags, codes, scales, *figures = self._lane.run(cast, *_parts(held))
        if flags.any() or (scales == e8m0.NAN).any():
            return None
        return codes, scales, _figures(held.codes.shape[0] * held.shape[1], scales, *figures)


def _parts(held: Weight) -> tuple[Array, ...]:
    return (held.codes,) if held.scales is None else (held.codes, held.scales)


def _decoded(
    form: Format, codes: Tensor, scales: Tensor | None = None, *, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """The values as BF16, and flags: whether that is all of them.

    Where they are to be ``rounded`` anyway, products with float32 scales are float32, all of them.
    """
    if scales is None:
        return codes, torch.zeros((), dtype=torch.int32, device=codes.device)
    if rounded and form.scale == "f32":
        values = ops.block_dequant(codes, scales, form, torch.float32)
        return values, torch.zeros((), dtype=torch.int32, device=codes.device)
    decode = ops.fp4_to_bf16 if form.kind == "fp4" else ops.fp8_to_bf16
    return decode(codes, scales, form)


def _quantised(values: Tensor, after: Format, rule: ScaleRule) -> Quantised:
    assert after.block is not None
    if after.kind == "fp4":
        return ops.quantise_fp4(values, rule, after.block[1])
    return ops.quantise_fp8(values, rule, after.block)


def _keep_exact_tiles(
    made: Quantised, codes: Tensor, scales: Tensor, before: Format, after: Format
) -> Quantised:
    """Their figures are the same: no error under any rule."""
    assert after.block is not None
    tiles = ops.fp4_to_fp8(codes, scales, before, after)
    is_kept = tiles.verdicts == EXACT_TILE
    per_value = spread_blocks(is_kept, after.block, (made.codes.shape[0], made.codes.shape[1]))
    return made._replace(
        codes=torch.where(per_value, tiles.codes, made.codes),
        scales=torch.where(is_kept, tiles.scales, made.scales),
    )


def _figures(
    values: int,
    scales: Array,
    value_squares: Array,
    error_squares: Array,
    largest_errors: Array,
    saturated: Array,
    flushed: Array,
) -> Figures:
    """Added up as ``figures`` says: along a row of blocks from left to right."""
    made = Figures.empty(len(scales))
    made.begin(len(scales), values=values, blocks=scales.size)
    made.value_squares[:] = np.cumsum(value_squares, axis=1)[:, -1]
    made.error_squares[:] = np.cumsum(error_squares, axis=1)[:, -1]
    made.largest_error[0] = largest_errors.max()
    made.counts[SATURATED] = saturated.sum(dtype=np.int64)
    made.counts[FLUSHED] = flushed.sum(dtype=np.int64)
    made.counts[EXACT] = np.count_nonzero(error_squares == 0)
    made.scales[:] = np.bincount(scales.reshape(-1), minlength=256)
    return made
