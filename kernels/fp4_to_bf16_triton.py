"""fp4_to_bf16, the twin: bit for bit what the definition gives."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.formats.blocks import FP4, Format
from dsv4_quant.kernels.fp4_to_bf16_torch import check_kind
from dsv4_quant.kernels.launch_triton import OPTIONS, fold_groups, tile_rows
from dsv4_quant.kernels.minifloat_triton import e8m0_value
from dsv4_quant.kernels.operands_torch import as_bytes, weight_shape
from dsv4_quant.kernels.verdicts import INEXACT, NAN


@triton.jit
def _value_bits(nibble, scale):
    # torch: e2m1.VALUES[nibble] * scale + 0.0
    # The code where float32 has exponent and mantissa is the value times 2**-126, subnormal 0.5
    # included.
    bits = ((nibble & 0x7) << 22) | ((nibble & 0x8) << 28)
    value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126
    return (value * scale + 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _fp4_to_bf16_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,
    flags_ptr,
    rows,
    cols,
    scale_rows,
    scale_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    INEXACT: tl.constexpr,
    NAN: tl.constexpr,
):
    # One program: ROWS rows of one column of blocks, which is LANES bytes wide; a byte holds two
    # codes and becomes a word of two BF16. Axis 2 walks the matrices of a stack.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, LANES)
    byte = block * (BLOCK_COLS // 2) + lane
    inside = (row < rows)[:, None] & ((lane < BLOCK_COLS // 2) & (byte < cols // 2))[None, :]
    at = (matrix * rows + row)[:, None] * (cols // 2) + byte[None, :]
    codes = tl.load(codes_ptr + at, inside, other=0).to(tl.int32)
    scale_at = (matrix * scale_rows + row // BLOCK_ROWS) * scale_cols + block
    stored = tl.load(scales_ptr + scale_at, row < rows, other=0).to(tl.int32)  # [ROWS]
    scale = e8m0_value(stored)[:, None]
    even = _value_bits(codes, scale)
    odd = _value_bits(codes >> 4, scale)
    # The upper halves are the values: nothing is rounded.
    words = ((even >> 16) & 0xFFFF) | (odd & -65536)
    words = tl.where((stored == 0xFF)[:, None], 0x7FC07FC0, words)
    tl.store(out_ptr + at, words, inside)
    if tl.max(stored, 0) > 252:
        # torch: flags = values.isinf().any() * INEXACT | nan.any() * NAN
        infinite = ((even & 0x7FFFFFFF) == 0x7F800000) | ((odd & 0x7FFFFFFF) == 0x7F800000)
        flags = tl.where(infinite, INEXACT, tl.where((stored == 0xFF)[:, None], NAN, 0))
        tl.atomic_or(flags_ptr + matrix, tl.reduce_or(tl.reduce_or(flags, 1), 0))


def fp4_to_bf16(codes: Tensor, scales: Tensor, fmt: Format = FP4) -> tuple[Tensor, Tensor]:
    """See the definition, ``fp4_to_bf16_torch.fp4_to_bf16``."""
    check_kind(fmt, "fp4")
    rows, cols = weight_shape(codes, scales, fmt)
    assert fmt.block is not None
    stack = codes.shape[:-2]
    out = torch.empty((*stack, rows, cols), dtype=torch.bfloat16, device=codes.device)
    flags = torch.zeros(stack, dtype=torch.int32, device=codes.device)
    if out.numel():
        if fmt.block[0] == 1:
            rows, cols = fold_groups(rows, cols, fmt.block[1])
        lanes = triton.next_power_of_2(fmt.block[1] // 2)
        tile = tile_rows(rows, lanes)
        scale_rows, scale_cols = fmt.scale_shape((rows, cols))
        _fp4_to_bf16_kernel[(triton.cdiv(rows, tile), scale_cols, flags.numel())](
            as_bytes(codes).contiguous(),
            as_bytes(scales).contiguous(),
            out.view(torch.int32),
            flags,
            rows,
            cols,
            scale_rows,
            scale_cols,
            BLOCK_ROWS=fmt.block[0],
            BLOCK_COLS=fmt.block[1],
            ROWS=tile,
            LANES=lanes,
            INEXACT=INEXACT,
            NAN=NAN,
            **OPTIONS,
        )
    return out, flags
