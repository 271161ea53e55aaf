"""block_dequant, the twin: bit for bit what the definition gives (the bits of a NaN aside)."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.formats.blocks import Format
from dsv4_quant.kernels.launch_triton import OPTIONS, fold_groups, tile_rows
from dsv4_quant.kernels.minifloat_triton import (
    e2m1_value,
    e4m3_value,
    round_to,
    scale_value,
    unpack_pairs,
)
from dsv4_quant.kernels.operands_torch import FLOATS, as_bytes, as_scales, weight_shape


@triton.jit
def _block_dequant_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,
    rows,
    cols,
    scale_rows,
    scale_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PER_BYTE: tl.constexpr,
):
    # One program: ROWS rows of one column of blocks, which is LANES wide, BLOCK_COLS of them used.
    # Axis 2 walks the matrices of a stack.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, LANES // PER_BYTE)
    byte = block * (BLOCK_COLS // PER_BYTE) + lane
    used = (lane < BLOCK_COLS // PER_BYTE) & (byte < cols // PER_BYTE)
    at = (matrix * rows + row)[:, None] * (cols // PER_BYTE) + byte[None, :]
    codes = tl.load(codes_ptr + at, (row < rows)[:, None] & used[None, :], other=0).to(tl.int32)
    # torch: values = VALUES[codes]
    values = e2m1_value(unpack_pairs(codes)) if PER_BYTE == 2 else e4m3_value(codes)
    # torch: values * scale_values(scales).repeat_interleave(...)
    scale_at = (matrix * scale_rows + row // BLOCK_ROWS) * scale_cols + block
    scales = scale_value(tl.load(scales_ptr + scale_at, row < rows, other=0))  # [ROWS]
    values = values * scales[:, None]
    lane = tl.arange(0, LANES)
    col = block * BLOCK_COLS + lane
    inside = (row < rows)[:, None] & ((lane < BLOCK_COLS) & (col < cols))[None, :]
    at = (matrix * rows + row)[:, None] * cols + col[None, :]
    tl.store(out_ptr + at, round_to(values, out_ptr.dtype.element_ty), inside)


def block_dequant(
    codes: Tensor, scales: Tensor, fmt: Format, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """See the definition, ``block_dequant_torch.block_dequant``."""
    if dtype not in FLOATS:
        raise TypeError(f"decodes to float32 or bfloat16, not {dtype}")
    rows, cols = weight_shape(codes, scales, fmt)
    assert fmt.block is not None
    out = torch.empty((*codes.shape[:-1], cols), dtype=dtype, device=codes.device)
    if out.numel():
        matrices = out.numel() // (rows * cols)
        if fmt.block[0] == 1:
            rows, cols = fold_groups(rows, cols, fmt.block[1])
        lanes = triton.next_power_of_2(fmt.block[1])
        tile = tile_rows(rows, lanes)
        scale_rows, scale_cols = fmt.scale_shape((rows, cols))
        grid = (triton.cdiv(rows, tile), scale_cols, matrices)
        _block_dequant_kernel[grid](
            as_bytes(codes).contiguous(),
            as_scales(scales).contiguous(),
            out,
            rows,
            cols,
            scale_rows,
            scale_cols,
            BLOCK_ROWS=fmt.block[0],
            BLOCK_COLS=fmt.block[1],
            ROWS=tile,
            LANES=lanes,
            PER_BYTE=2 if fmt.kind == "fp4" else 1,
            **OPTIONS,
        )
    return out
