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
    MARGIN,
    MIN_EXPONENT,
    ZERO_EXPONENTS,
    Element,
    ScaleRule,
    candidates,
)
from dsv4_quant.kernels.launch_triton import OPTIONS, TILE, float_bits, fold_groups, tile_rows
from dsv4_quant.kernels.minifloat_triton import ceil_exponent, nearest_code, widen
from dsv4_quant.kernels.quantise_blocks_torch import GRIDS, Quantised

(MARGIN_BITS,) = struct.unpack("<q", struct.pack("<d", MARGIN))
"""As bits: Triton could take a number so near to 1 for a float32."""

@triton.jit
def _fold_sum(x):
    # torch: while n > 1: n //= 2; x = x[..., :n] + x[..., n:]   [BLOCKS, LANES] -> [BLOCKS]
    BLOCKS: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    if n == 1:
        total = tl.reshape(x, (BLOCKS,))
    else:
        total = _fold_sum(tl.sum(tl.reshape(x, (BLOCKS, 2, n // 2)), 1))  # two terms: no order
    return total


@triton.jit
def _code_value(code, exponent, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    # torch: grid[code] * 2.0**exponent   in float64
    # A normal code has float64's layout but for the bias; its mantissa is in the upper word. A
    # subnormal one is taken for one of the first binade, and the 2**(1 - BIAS) too much goes again.
    subnormal = code < (1 << MANTISSA)
    first = (exponent + (1023 - BIAS + 1)) << 20
    code += tl.where(subnormal, 1 << MANTISSA, 0)
    upper = (code << (20 - MANTISSA)) + ((exponent + (1023 - BIAS)) << 20)
    value = (upper.to(tl.int64) << 32).to(tl.float64, bitcast=True)
    return value - tl.where(subnormal, (first.to(tl.int64) << 32).to(tl.float64, bitcast=True), 0.0)


@triton.jit
def _round(magnitude, scaled, s_max, exponent, MANTISSA, BIAS, TOP_CODE):
    # torch: codes, errors = _round(values, exponents, grid)
    # scaled = magnitude / 2**s_max as float32 bits. Where that rounds, the code is 0 in any case.
    code = nearest_code(scaled, (exponent - s_max)[:, None], MANTISSA, BIAS)
    code = tl.minimum(code, TOP_CODE)
    return code, magnitude - _code_value(code, exponent[:, None], MANTISSA, BIAS)


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
    LANES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    TOP_BITS: tl.constexpr,
    TOP_CODE: tl.constexpr,
    ZERO_EXPONENT: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MARGIN_BITS: tl.constexpr,
):
    # One program: BLOCKS blocks, one below the other; each LANES long, B * C of them used.
    # Axis 2 walks the matrices of a stack.
    i = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    j = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, LANES)
    row = i[:, None] * B + (lane // C)[None, :]
    col = j * C + lane % C
    inside = (row < rows) & ((lane < B * C) & (col < cols))[None, :]
    at = (matrix * rows + row) * cols + col[None, :]
    x = widen(tl.load(x_ptr + at, inside, other=0.0))  # [BLOCKS, LANES]

    # torch: refused = ~blocks.isfinite().all(-1); values = blocks.masked_fill(refused, 0)
    bits = x.to(tl.int32, bitcast=True)
    amax = tl.max(bits & 0x7FFFFFFF, 1)  # bits of magnitudes order as the numbers do
    refused = amax >= 0x7F800000
    bits = tl.where(refused[:, None], 0, bits)
    amax = tl.where(refused, 0, amax)
    # torch: s_max = max_exponents(values, element)
    # A subnormal amax has an exponent field of 0 and so an s far below the smallest.
    s_max = tl.maximum(ceil_exponent(amax, TOP_BITS), MIN_EXPONENT)
    s_max = tl.where(amax == 0, ZERO_EXPONENT, s_max)

    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    inverse = ((127 - s_max) << 23).to(tl.float32, bitcast=True)  # s_max is at most 126: normal
    scaled = (magnitude * inverse[:, None]).to(tl.int32, bitcast=True)
    magnitude = magnitude.to(tl.float64)
    codes, errors = _round(magnitude, scaled, s_max, s_max, MANTISSA, BIAS, TOP_CODE)
    best, exponent = _fold_sum(errors * errors), s_max
    for step in tl.static_range(1, CANDIDATES):
        tried = tl.maximum(s_max - step, MIN_EXPONENT)
        tried_codes, errors = _round(magnitude, scaled, s_max, tried, MANTISSA, BIAS, TOP_CODE)
        sums = _fold_sum(errors * errors)
        margin = tl.full((BLOCKS,), MARGIN_BITS, tl.int64).to(tl.float64, bitcast=True)
        better = sums < best * margin
        best = tl.where(better, sums, best)
        exponent = tl.where(better, tried, exponent)
        codes = tl.where(better[:, None], tried_codes, codes)
    errors = magnitude - _code_value(codes, exponent[:, None], MANTISSA, BIAS)
    # torch: saturated = (values.abs() > top * S).sum(-1); flushed = (values != 0) & (codes == 0)
    top = TOP_BITS + ((exponent - s_max) << 23)
    beyond = (scaled > top[:, None]).to(tl.int32)
    lost = ((magnitude > 0) & (codes == 0)).to(tl.int32)

    block = (matrix * h + i) * w + j
    stored = i < h
    scales = tl.where(refused, 0xFF, exponent + 127).to(tl.uint8)
    tl.store(scales_ptr + block, scales, stored)
    tl.store(value_squares_ptr + block, _fold_sum(magnitude * magnitude), stored)
    tl.store(error_squares_ptr + block, best, stored)
    tl.store(largest_errors_ptr + block, tl.max(tl.abs(errors), 1).to(tl.float32), stored)
    tl.store(saturated_ptr + block, tl.sum(beyond, 1), stored)
    tl.store(flushed_ptr + block, tl.sum(lost, 1), stored)

    if MANTISSA == 3:
        # torch: codes | values.signbit() << 7, and NaN, the code after the largest, where refused
        codes = tl.where(refused[:, None], TOP_CODE + 1, codes | ((bits >> 24) & 0x80))
        tl.store(codes_ptr + at, codes.to(tl.uint8), inside)
    else:
        # torch: codes |= (values.signbit() & (codes > 0)) << 3
        codes = tl.where(codes > 0, codes | ((bits >> 28) & 0x8), 0)
        # torch: codes[..., 0::2] | codes[..., 1::2] << 4
        low, high = tl.split(tl.reshape(codes, (BLOCKS, LANES // 2, 2)))
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
    scale_shape = (*stack, triton.cdiv(rows, b), triton.cdiv(cols, c))
    width = cols // 2 if element == "fp4" else cols
    codes = torch.empty((*stack, rows, width), dtype=torch.uint8, device=x.device)
    per_block = (torch.uint8, *[torch.float64] * 2, torch.float32, *[torch.int32] * 2)
    figures = [torch.empty(scale_shape, dtype=dtype, device=x.device) for dtype in per_block]
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
            LANES=lanes,
            CANDIDATES=candidates(rule, element, b * c),
            MANTISSA=mantissa,
            BIAS=bias,
            TOP_BITS=float_bits(GRIDS[element][-1]),
            TOP_CODE=len(GRIDS[element]) - 1,
            ZERO_EXPONENT=ZERO_EXPONENTS[element],
            MIN_EXPONENT=MIN_EXPONENT,
            MARGIN_BITS=MARGIN_BITS,
            num_warps=warps(blocks * lanes),
            **OPTIONS,
        )
    return Quantised(codes, *figures)


def warps(elements: int) -> int:
    """Warps for a tile: 32 elements for each thread, as in TILE, and at most 512 threads."""
    return min(16, max(4, elements * 4 // TILE))
