"""What the twins of quantise_fp4 and quantise_fp8 share: one kernel, blocks to codes and scales.

Codes come from integer arithmetic (minifloat_triton says why). Errors are float64, where all but
their sums is exact, and the sums have the definition's order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.formats.rules import (
    FP8_LOSING,
    MARGIN,
    MIN_EXPONENT,
    ZERO_EXPONENTS,
    Element,
    ScaleRule,
    candidates,
)
from dsv4_quant.kernels.blocks_triton import block_count, block_max, fold_sum, lane_shape
from dsv4_quant.kernels.launch_triton import OPTIONS, TILE, float_bits, fold_groups, tile_rows
from dsv4_quant.kernels.minifloat_triton import ceil_exponent, e8m0_value, widen
from dsv4_quant.kernels.quantise_blocks_torch import GRIDS
from dsv4_quant.kernels.quantised_torch import Quantised

(MARGIN_BITS,) = struct.unpack("<q", struct.pack("<d", MARGIN))
"""As bits: Triton could take a number so near to 1 for a float32."""

DTYPES = (torch.uint8, torch.float64, torch.float64, torch.float32, torch.int32, torch.int32)
"""Of all parts of a Quantised but the codes."""


@triton.jit
def _nearest(scaled, step, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP_BITS: tl.constexpr):
    # torch: grid[codes] * 2.0**-step   for codes of scaled * 2**step
    # Grid points of a binade 2**e are 2**(e - MANTISSA) apart, and below the smallest normal one no
    # closer. Beside 1.5 * 2**(e - MANTISSA + 23) float32 numbers are that far apart: adding that
    # number rounds, ties to even, and taking it off again is exact.
    smallest = (128 - BIAS - step) << 23
    binade = tl.maximum(scaled.to(tl.int32, bitcast=True) & 0x7F800000, smallest)
    large = (binade + ((23 - MANTISSA) << 23) + 0x400000).to(tl.float32, bitcast=True)
    top = (TOP_BITS - (step << 23)).to(tl.float32, bitcast=True)
    return tl.minimum((scaled + large) - large, top)


@triton.jit
def _errors(magnitude, nearest, half_scale):
    # torch: |v| - grid[codes] * S
    # Exact: both differences are multiples of |v|'s last bit and no larger than |v|; and half of
    # grid[codes] * S, unlike the whole, is always in range.
    half = nearest * half_scale
    return magnitude - half - half


@triton.jit
def _squares(x):
    wide = x.to(tl.float64)
    return wide * wide


@triton.jit
def _quantise_blocks_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    value_squares_ptr,
    error_squares_ptr,
    largest_errors_ptr,
    saturated_ptr,
    flushed_ptr,
    rows,
    cols,
    h,
    w,
    B: tl.constexpr,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    CANDIDATES: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    TOP_BITS: tl.constexpr,
    ZERO_EXPONENT: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MARGIN_BITS: tl.constexpr,
    FP8_LOSING: tl.constexpr,
):
    # One program: BLOCKS blocks, one below the other, of LANES values, B * C of them used.
    # Axis 2 walks the matrices of a stack.
    # As [P, BLOCKS, T, K] a thread holds K neighbours and all P, so that it folds P by itself.
    LANES: tl.constexpr = P * T * K
    i = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    j = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, P)[:, None, None] * T + tl.arange(0, T)[None, :, None]
    lane = (lane * K + tl.arange(0, K)[None, None, :])[:, None, :, :]  # [P, 1, T, K]
    row = i[None, :, None, None] * B + lane // C
    col = j * C + lane % C
    inside = (row < rows) & (lane < B * C) & (col < cols)
    at = (matrix * rows + row) * cols + col
    x = widen(tl.load(x_ptr + at, inside, other=0.0))  # [P, BLOCKS, T, K]

    # torch: refused = ~blocks.isfinite().all(-1); values = blocks.masked_fill(refused, 0)
    bits = x.to(tl.int32, bitcast=True)
    amax = block_max(bits & 0x7FFFFFFF)  # bits of magnitudes order as the numbers do
    refused = amax >= 0x7F800000
    bits = tl.where(refused[None, :, None, None], 0, bits)
    amax = tl.where(refused, 0, amax)
    # torch: s_max = max_exponents(values, element)
    # A subnormal amax has an exponent field of 0 and so an s far below the smallest.
    s_max = tl.maximum(ceil_exponent(amax, TOP_BITS), MIN_EXPONENT)
    s_max = tl.where(amax == 0, ZERO_EXPONENT, s_max)

    # torch: codes, errors = _round(values, exponents, grid); best = fold_sum(errors.square())
    # Where scaled is rounded, it is so small that its code is 0 anyway.
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    inverse = e8m0_value(127 - s_max)
    scaled = magnitude * inverse[None, :, None, None]
    half_scale = (e8m0_value(127 + s_max) * 0.5)[None, :, None, None]
    step = tl.zeros((BLOCKS,), tl.int32)
    nearest = _nearest(scaled, step[None, :, None, None], MANTISSA, BIAS, TOP_BITS)
    best = fold_sum(_squares(_errors(magnitude, nearest, half_scale)))
    # Only FP8 knows blocks that have nothing to gain (rules.candidates).
    gaining = tl.min(amax.to(tl.float32, bitcast=True) * inverse) < FP8_LOSING
    for candidate in tl.static_range(1, CANDIDATES):
        if gaining:
            tried = tl.minimum(candidate, s_max - MIN_EXPONENT)
            rounded = _nearest(scaled, tried[None, :, None, None], MANTISSA, BIAS, TOP_BITS)
            sums = fold_sum(_squares(_errors(magnitude, rounded, half_scale)))
            # torch: better = sums < best * MARGIN
            margin = tl.full((BLOCKS,), MARGIN_BITS, tl.int64).to(tl.float64, bitcast=True)
            better = sums < best * margin
            best = tl.where(better, sums, best)
            step = tl.where(better, tried, step)
            nearest = tl.where(better[None, :, None, None], rounded, nearest)
    errors = tl.abs(_errors(magnitude, nearest, half_scale))
    # torch: saturated = (values.abs() > top * S).sum(-1); flushed = (values != 0) & (codes == 0)
    saturated = tl.zeros((BLOCKS,), tl.int32)
    if CANDIDATES > 1:
        top = (TOP_BITS - (step << 23)).to(tl.float32, bitcast=True)
        saturated = block_count(scaled > top[None, :, None, None])

    block = (matrix * h + i) * w + j
    stored = i < h
    scales = tl.where(refused, 0xFF, s_max - step + 127).to(tl.uint8)
    tl.store(scales_ptr + block, scales, stored)
    tl.store(value_squares_ptr + block, fold_sum(_squares(magnitude)), stored)
    tl.store(error_squares_ptr + block, best, stored)
    tl.store(largest_errors_ptr + block, block_max(errors), stored)
    tl.store(saturated_ptr + block, saturated, stored)
    tl.store(flushed_ptr + block, block_count((magnitude > 0) & (nearest == 0)), stored)

    # A grid point times 2**(BIAS - 127) has its code where float32 has exponent and mantissa,
    # subnormals included.
    shift = ((step + BIAS) << 23).to(tl.float32, bitcast=True)
    codes = (nearest * shift[None, :, None, None]).to(tl.int32, bitcast=True) >> (23 - MANTISSA)
    if MANTISSA == 3:
        # torch: codes | values.signbit() << 7, and NaN where refused
        codes |= (bits >> 24) & 0x80
        codes = tl.where(refused[None, :, None, None], 0x7F, codes)
        tl.store(codes_ptr + at, codes.to(tl.uint8), inside)
    else:
        # torch: codes |= (values.signbit() & (codes > 0)) << 3
        codes = tl.where(codes > 0, codes | ((bits >> 28) & 0x8), 0)
        # torch: codes[..., 0::2] | codes[..., 1::2] << 4
        codes = tl.reshape(tl.permute(codes, (1, 0, 2, 3)), (BLOCKS, LANES // 2, 2))
        low, high = tl.split(codes)
        pair = tl.arange(0, LANES // 2)
        row = i[:, None] * B + (pair // (C // 2))[None, :]
        byte = j * (C // 2) + pair % (C // 2)
        inside = (row < rows) & ((pair < B * C // 2) & (byte < cols // 2))[None, :]
        at = (matrix * rows + row) * (cols // 2) + byte[None, :]
        tl.store(codes_ptr + at, (low | (high << 4)).to(tl.uint8), inside)


def quantise_blocks(
    x: Tensor, element: Element, rule: ScaleRule, block: tuple[int, int]
) -> Quantised:
    """Quantise the blocks of ``[..., R, C]``; one launch for a whole stack of matrices."""
    mantissa, bias = (1, 1) if element == "fp4" else (3, 7)
    (*stack, rows, cols), (b, c) = x.shape, block
    width = cols // 2 if element == "fp4" else cols
    codes = torch.empty((*stack, rows, width), dtype=torch.uint8, device=x.device)
    scale_shape = (*stack, triton.cdiv(rows, b), triton.cdiv(cols, c))
    figures = [torch.empty(scale_shape, dtype=dtype, device=x.device) for dtype in DTYPES]
    if x.numel():
        matrices = math.prod(stack)
        if b == 1:
            matrices, (rows, cols) = 1, fold_groups(matrices * rows, cols, c)
        h, w, lanes = triton.cdiv(rows, b), triton.cdiv(cols, c), triton.next_power_of_2(b * c)
        blocks = tile_rows(h, lanes)
        _quantise_blocks_kernel[(triton.cdiv(h, blocks), w, matrices)](
            x.contiguous(),
            codes,
            *figures,
            rows,
            cols,
            h,
            w,
            B=b,
            C=c,
            BLOCKS=blocks,
            **lane_shape(lanes),
            CANDIDATES=candidates(rule, element, b * c),
            MANTISSA=mantissa,
            BIAS=bias,
            TOP_BITS=float_bits(GRIDS[element][-1]),
            ZERO_EXPONENT=ZERO_EXPONENTS[element],
            MIN_EXPONENT=MIN_EXPONENT,
            MARGIN_BITS=MARGIN_BITS,
            FP8_LOSING=FP8_LOSING,
            num_warps=min(8, max(4, blocks * lanes * 4 // TILE)),
            **OPTIONS,
        )
    return Quantised(codes, *figures)
