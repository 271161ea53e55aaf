"""fp4_to_fp8: FP4 weights to FP8 by the published rule, with a verdict for every tile.

A tile takes the scale S = (its largest scale) / 2**6, and a value becomes the code of
``fp4 * scale / S``: in the block with the largest scale 6 becomes 6 * 64 = 384 <= 448. Exact while
no other block's scale is smaller by more than 2**14 (2**17 for some codes). Definition; bit-stable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.formats.blocks import FP4, Format
from dsv4_quant.kernels.block_dequant_torch import decode_codes
from dsv4_quant.kernels.blocks_torch import split_blocks, spread_blocks
from dsv4_quant.kernels.defaults import FP8
from dsv4_quant.kernels.operands_torch import as_bytes, lookup, scale_values, weight_shape
from dsv4_quant.kernels.verdicts import EXACT, NAN_SCALE, SPREAD, UNDERFLOW

HEADROOM = 6
"""S is 2**6 below the largest scale."""

FLUSHED = -20
"""The scale of a block relative to S from which on every code is lost; smaller ones count as it."""

WORD = 32
"""Groups are whole multiples of so many columns."""


class Fp8Tiles(NamedTuple):
    """An FP8 weight, and what is known of each of its t x T tiles; all uint8.

    codes     ``[..., R, C]`` E4M3
    scales    ``[..., t, T]`` E8M0
    verdicts  ``[..., t, T]`` EXACT, SPREAD, UNDERFLOW or NAN_SCALE
    low       ``[..., t, T]`` the smallest scale byte of a group with a non-zero code, 255 without
    high      ``[..., t, T]`` the largest of these, 0 without
    top       ``[..., t, T]`` the largest scale byte of all
    """

    codes: Tensor
    scales: Tensor
    verdicts: Tensor
    low: Tensor
    high: Tensor
    top: Tensor


def fp4_to_fp8(codes: Tensor, scales: Tensor, fmt: Format = FP4, target: Format = FP8) -> Fp8Tiles:
    """Cast a stack of matrices; code 8 (-0) becomes +0, as published.

    Where a tile is not exact its codes are the nearest ones, ties to even; where one of its scales
    is 0xFF they are all NaN (0x7F), and so is S.

    Args:
        codes: ``[..., R, C / 2]``, low nibble first, bytes.
        scales: ``[..., R, C / group]`` E8M0 bytes.
        fmt: FP4 in groups of a multiple of 32 columns, of which C is a multiple.
        target: FP8 with E8M0 scales and tiles of whole groups. Tiles at the edges may be ragged.
    """
    group, tile = check_cast(codes, scales, fmt, target)
    scales = as_bytes(scales)
    blocks = tile[0], tile[1] // group  # a tile in scales
    rows, groups = scales.shape[-2:]
    top = split_blocks(scales, blocks).amax(-1)  # [..., t, T]
    headroom = (top.int() - HEADROOM).clamp_min(0)
    out_scales = torch.where(top == e8m0.NAN, e8m0.NAN, headroom)

    values = decode_codes(as_bytes(codes), fmt) + 0.0  # [..., R, C]; -0 + 0 = +0
    steps = scales.int() - spread_blocks(out_scales, blocks, (rows, groups))
    factors = scale_values((steps.clamp_min(FLUSHED) + e8m0.BIAS).to(torch.uint8))
    scaled = values * factors.repeat_interleave(group, -1)
    out = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    lost = lookup(out, torch.tensor(e4m3.VALUES).to(out.device)) != scaled
    nan = spread_blocks(top == e8m0.NAN, tile, (rows, groups * group))

    live = values.reshape(*scales.shape, group).any(-1)  # [..., R, C / group]
    low = split_blocks(torch.where(live, scales, 255), blocks, 255).amin(-1)
    high = split_blocks(torch.where(live, scales, 0), blocks).amax(-1)
    verdicts = torch.where(split_blocks(lost, tile).any(-1), SPREAD, EXACT)
    verdicts = torch.where((top < HEADROOM) & (low < 255), UNDERFLOW, verdicts)
    verdicts = torch.where(top == e8m0.NAN, NAN_SCALE, verdicts)
    return Fp8Tiles(
        codes=out.masked_fill(nan, e4m3.NAN_CODES[0]),
        scales=out_scales.to(torch.uint8),
        verdicts=verdicts.to(torch.uint8),
        low=low,
        high=high,
        top=top,
    )


def check_cast(
    codes: Tensor, scales: Tensor, fmt: Format, target: Format
) -> tuple[int, tuple[int, int]]:
    """The group and the tile; a ValueError where they do not fit each other or the operands."""
    if fmt.kind != "fp4" or target.kind != "fp8" or target.scale != "e8m0":
        raise ValueError(f"casts fp4 to fp8 with e8m0 scales, not {fmt} to {target}")
    _, cols = weight_shape(codes, scales, fmt)
    assert fmt.block is not None and target.block is not None
    rows, group = fmt.block
    if rows != 1 or group % WORD or cols % group or target.block[1] % group:
        raise ValueError(f"{cols} columns of {fmt} do not fit tiles of {target}")
    return group, target.block
