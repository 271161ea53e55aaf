"""fp8_to_bf16, the twin: bit for bit what the definition gives."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.formats.blocks import Format
from dsv4_quant.kernels.defaults import FP8
from dsv4_quant.kernels.fp4_to_bf16_torch import check_kind
from dsv4_quant.kernels.launch_triton import OPTIONS, tile_rows
from dsv4_quant.kernels.minifloat_triton import round_to, scale_value
from dsv4_quant.kernels.operands_torch import as_bytes, as_scales, weight_shape
from dsv4_quant.kernels.verdicts import INEXACT, NAN


@triton.jit
def _careful(value, scale, INEXACT: tl.constexpr, NAN: tl.constexpr):
    # torch: values = (value * scale).bfloat16(); flags   for any scale
    # The product has 28 bits: exact in float64.
    infinite = (scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF) == 0x7F800000
    scale = tl.where(infinite, float("nan"), scale)
    exact = value.to(tl.float64) * scale.to(tl.float64)
    rounded = round_to(value * scale, tl.bfloat16).to(tl.int16, bitcast=True)
    found = (rounded.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    nan = exact != exact
    flags = tl.where(nan, NAN, tl.where(found != exact, INEXACT, 0))
    return rounded, tl.reduce_or(tl.reduce_or(flags, 1), 0)


@triton.jit
def _fp8_to_bf16_kernel(
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
    # One program: ROWS rows of one column of blocks, which is LANES wide, BLOCK_COLS of them used.
    # Axis 2 walks the matrices of a stack.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, LANES)
    col = block * BLOCK_COLS + lane
    inside = (row < rows)[:, None] & ((lane < BLOCK_COLS) & (col < cols))[None, :]
    at = (matrix * rows + row)[:, None] * cols + col[None, :]
    codes = tl.load(codes_ptr + at, inside, other=0).to(tl.int32)
    scale_at = (matrix * scale_rows + row // BLOCK_ROWS) * scale_cols + block
    scale = scale_value(tl.load(scales_ptr + scale_at, row < rows, other=0))  # [ROWS]

    # torch: value = e4m3.VALUES[codes]
    # The code where float32 has exponent and mantissa is the value times 2**-120, subnormals
    # included. NaN would be 480; _careful makes a NaN of it.
    bits = ((codes & 0x7F) << 20) | ((codes & 0x80) << 24)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    # torch: values = value * scales.repeat_interleave(...)
    # From 2**-124 to 2**119 a power of two gives BF16 numbers, so that the upper half is the
    # product: a code has four bits, and is a multiple of 2**-9; BF16 has those of 2**-133.
    scale_bits = scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    plain = ((scale_bits & 0x7FFFFF) == 0) & (scale_bits >= 3 << 23) & (scale_bits <= 246 << 23)
    nan = (codes & 0x7F) == 0x7F
    special = tl.where(plain | (row >= rows), tl.max(nan.to(tl.int32), 1), 1)
    if tl.max(special, 0) == 0:
        out = ((value * scale[:, None]).to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    else:
        value = tl.where(nan, float("nan"), value)
        out, flags = _careful(value, scale[:, None], INEXACT, NAN)
        tl.atomic_or(flags_ptr + matrix, flags)
    tl.store(out_ptr + at, out, inside)


def fp8_to_bf16(codes: Tensor, scales: Tensor, fmt: Format = FP8) -> tuple[Tensor, Tensor]:
    """See the definition, ``fp8_to_bf16_torch.fp8_to_bf16``."""
    check_kind(fmt, "fp8")
    rows, cols = weight_shape(codes, scales, fmt)
    assert fmt.block is not None
    stack = codes.shape[:-2]
    out = torch.empty((*stack, rows, cols), dtype=torch.bfloat16, device=codes.device)
    flags = torch.zeros(stack, dtype=torch.int32, device=codes.device)
    if out.numel():
        lanes = triton.next_power_of_2(fmt.block[1])
        tile = tile_rows(rows, lanes)
        scale_rows, scale_cols = fmt.scale_shape((rows, cols))
        _fp8_to_bf16_kernel[(triton.cdiv(rows, tile), scale_cols, flags.numel())](
            as_bytes(codes).contiguous(),
            as_scales(scales).contiguous(),
            out.view(torch.int16),
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
