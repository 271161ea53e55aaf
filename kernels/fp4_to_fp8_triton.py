"""fp4_to_fp8, the twin: bit for bit what the definition gives.

Eight FP4 codes are one 32-bit word and become two. They are worked on side by side, masks keep them
apart: a code at a time would take longer than the memory does.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.formats.blocks import FP4, Format
from dsv4_quant.kernels.defaults import FP8
from dsv4_quant.kernels.fp4_to_fp8_torch import FLUSHED, HEADROOM, WORD, Fp8Tiles, check_cast
from dsv4_quant.kernels.launch_triton import OPTIONS, TILE
from dsv4_quant.kernels.minifloat_triton import e2m1_value, e4m3_value, e8m0_value, nearest_code
from dsv4_quant.kernels.operands_torch import as_bytes
from dsv4_quant.kernels.verdicts import EXACT, NAN_SCALE, SPREAD, UNDERFLOW


@triton.jit
def _four_codes(x, base):
    # Four FP4 codes, in the low 16 bits of x, to four FP8 codes, all of them 0 or normal.
    # base holds the code of 0.5 * 2**step four times. With m the FP4 magnitude code the FP8 code is
    # base + 4 * m for m >= 2: 4 * m puts exponent and mantissa where FP8 has them. m = 1 is FP4's
    # subnormal 0.5, the base itself; m = 0 is 0, whatever its sign. At most 96 + 28 per byte:
    # nothing carries into the next one. (A base that is no code belongs to zeros only.)
    x = x & 0xFFFF
    x = (x | (x << 8)) & 0x00FF00FF
    x = (x | (x << 4)) & 0x0F0F0F0F
    m = x & 0x07070707
    is_one = m & ~(m >> 1) & ~(m >> 2) & 0x01010101
    not_zero = (m + 0x07070707) & 0x08080808  # bit 3 of m + 7
    mask = (not_zero << 5) - (not_zero >> 3)  # 0xFF where m > 0
    return (((x & 0x08080808) << 4) + ((m - is_one) << 2) + base) & mask


@triton.jit
def _four_nearest(x, step):
    # torch: out = (values * 2.0**step).to(float8_e4m3fn); lost = VALUES[out] != values * 2.0**step
    # Four codes as above for any step, one after the other.
    word = tl.zeros_like(x)
    lost = tl.zeros_like(x)
    factor = e8m0_value(step + 127)
    for k in range(4):
        nibble = (x >> (4 * k)) & 0xF
        value = e2m1_value(nibble & 0x7)
        code = nearest_code(value.to(tl.int32, bitcast=True), -step, MANTISSA=3, BIAS=7)
        lost |= (e4m3_value(code) != value * factor).to(tl.int32)
        code |= tl.where(nibble > 8, 0x80, 0)  # 8 is -0
        word |= code << (8 * k)
    return word, lost


@triton.jit
def _fp4_to_fp8_kernel(
    words_ptr,
    scales_ptr,
    out_ptr,
    out_scales_ptr,
    verdicts_ptr,
    low_ptr,
    high_ptr,
    top_ptr,
    rows,
    blocks,
    tiles,
    PER_SCALE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEADROOM: tl.constexpr,
    FLUSHED: tl.constexpr,
    EXACT: tl.constexpr,
    SPREAD: tl.constexpr,
    UNDERFLOW: tl.constexpr,
    NAN_SCALE: tl.constexpr,
):
    # One program: one tile, of blocks of 32 codes: 4 words in, 8 words out. They walk all matrices
    # in memory order.
    program = tl.program_id(0).to(tl.int64)
    tile = (program % tiles).to(tl.int32)
    strip = (program // tiles).to(tl.int32)
    strips = tl.cdiv(rows, TILE_ROWS)
    matrix = (strip // strips).to(tl.int64)
    in_tile = tl.arange(0, ROWS)
    in_matrix = strip % strips * TILE_ROWS + in_tile
    row = matrix * rows + in_matrix
    rows_inside = ((in_tile < TILE_ROWS) & (in_matrix < rows))[:, None]
    lane = tl.arange(0, BLOCKS)
    block = tile * TILE_BLOCKS + lane
    inside = rows_inside & ((lane < TILE_BLOCKS) & (block < blocks))[None, :]
    at = row[:, None] * (blocks // PER_SCALE) + (block // PER_SCALE)[None, :]
    scale = tl.load(scales_ptr + at, inside, other=0).to(tl.int32)  # [ROWS, BLOCKS]
    lane = tl.arange(0, BLOCKS * 4)
    word = tile * (TILE_BLOCKS * 4) + lane
    words_inside = rows_inside & ((lane < TILE_BLOCKS * 4) & (word < blocks * 4))[None, :]
    at = row[:, None] * (blocks * 4) + word[None, :]
    x = tl.load(words_ptr + at, words_inside, other=0)  # [ROWS, BLOCKS * 4]

    # torch: top = split_blocks(scales, blocks).amax(-1); out_scales = (top - HEADROOM).clamp_min(0)
    top = tl.max(tl.max(scale, 1), 0)
    out_scale = tl.where(top == 0xFF, 0xFF, tl.maximum(top - HEADROOM, 0))
    # torch: live = values.reshape(*scales.shape, group).any(-1)
    some = (x & 0x77777777) != 0
    live = tl.max(tl.reshape(some.to(tl.int32), (ROWS, BLOCKS, 4)), 2) > 0
    low = tl.min(tl.min(tl.where(live, scale, 255), 1), 0)
    high = tl.max(tl.max(tl.where(live, scale, 0), 1), 0)

    step = tl.broadcast_to((scale - out_scale)[:, :, None], (ROWS, BLOCKS, 4))
    step = tl.reshape(step, (ROWS, BLOCKS * 4))
    lost = 0
    if top == 0xFF:
        even = tl.full((ROWS, BLOCKS * 4), 0x7F7F7F7F, tl.int32)
        odd = even
    elif low - out_scale >= -5:  # then 0.5 * 2**step is a normal FP8 number in every live block
        base = ((step + 6) << 3) * 0x01010101
        even = _four_codes(x, base)
        odd = _four_codes(x >> 16, base)
    else:
        step = tl.maximum(step, FLUSHED)
        even, lost_even = _four_nearest(x, step)
        odd, lost_odd = _four_nearest(x >> 16, step)
        lost = tl.max(tl.max(lost_even | lost_odd, 1), 0)
    verdict = tl.where(lost > 0, SPREAD, EXACT)
    verdict = tl.where((top < HEADROOM) & (low < 255), UNDERFLOW, verdict)
    verdict = tl.where(top == 0xFF, NAN_SCALE, verdict)

    lane = tl.arange(0, BLOCKS * 8)
    word = tile * (TILE_BLOCKS * 8) + lane
    words_inside = rows_inside & ((lane < TILE_BLOCKS * 8) & (word < blocks * 8))[None, :]
    at = row[:, None] * (blocks * 8) + word[None, :]
    out = tl.reshape(tl.join(even, odd), (ROWS, BLOCKS * 8))
    tl.store(out_ptr + at, out, words_inside)
    tl.store(out_scales_ptr + program, out_scale.to(tl.uint8))
    tl.store(verdicts_ptr + program, verdict.to(tl.uint8))
    tl.store(low_ptr + program, low.to(tl.uint8))
    tl.store(high_ptr + program, high.to(tl.uint8))
    tl.store(top_ptr + program, top.to(tl.uint8))


def fp4_to_fp8(codes: Tensor, scales: Tensor, fmt: Format = FP4, target: Format = FP8) -> Fp8Tiles:
    """See the definition, ``fp4_to_fp8_torch.fp4_to_fp8``."""
    group, tile = check_cast(codes, scales, fmt, target)
    *stack, rows, groups = scales.shape
    tiles = target.scale_shape((rows, groups * group))
    out = torch.empty((*stack, rows, groups * group), dtype=torch.uint8, device=codes.device)
    figures = torch.empty((5, *stack, *tiles), dtype=torch.uint8, device=codes.device).unbind()
    if out.numel():
        tile_blocks = tile[1] // WORD
        lanes = triton.next_power_of_2(tile[0]), triton.next_power_of_2(tile_blocks)
        _fp4_to_fp8_kernel[(math.prod(stack) * tiles[0] * tiles[1],)](
            as_bytes(codes).contiguous().view(torch.int32),
            as_bytes(scales).contiguous(),
            out.view(torch.int32),
            *figures,
            rows,
            groups * group // WORD,
            tiles[1],
            PER_SCALE=group // WORD,
            TILE_ROWS=tile[0],
            TILE_BLOCKS=tile_blocks,
            ROWS=lanes[0],
            BLOCKS=lanes[1],
            HEADROOM=HEADROOM,
            FLUSHED=FLUSHED,
            EXACT=EXACT,
            SPREAD=SPREAD,
            UNDERFLOW=UNDERFLOW,
            NAN_SCALE=NAN_SCALE,
            num_warps=min(8, max(4, lanes[0] * lanes[1] * WORD * 2 // TILE)),
            **OPTIONS,
        )
    return Fp8Tiles(out, *figures)
