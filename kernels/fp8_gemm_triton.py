"""fp8_gemm, the twin: float32 sums instead of float64 ones, within ``bounds_torch.gemm_bound``."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.formats.blocks import Format
from dsv4_quant.kernels.defaults import ACT_GROUP, FP8
from dsv4_quant.kernels.fp8_gemm_torch import check_fp8, check_operands
from dsv4_quant.kernels.launch_triton import DOT_MIN, OPTIONS, dot_tile
from dsv4_quant.kernels.minifloat_triton import (
    e2m1_value,
    e4m3_value,
    round_to,
    scale_value,
    unpack_pairs,
)
from dsv4_quant.kernels.operands_torch import as_bytes, as_scales


@triton.jit
def _scaled_matmul_kernel(
    x_ptr,
    x_scales_ptr,
    w_ptr,
    w_scales_ptr,
    out_ptr,
    x_rows,
    w_rows,
    x_groups,
    w_blocks,
    COLS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STEP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PER_BYTE: tl.constexpr,
):
    # One program: a tile [M, N] of the result. Along K it goes in steps in which both scales are
    # constant; K lanes, STEP of them used.
    m = tl.program_id(1).to(tl.int64) * M + tl.arange(0, M)
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    x_at = m[:, None] * COLS + tl.arange(0, K)[None, :]
    w_at = n[:, None] * (COLS // PER_BYTE) + tl.arange(0, K // PER_BYTE)[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, COLS, STEP):
        left = tl.minimum(STEP, COLS - k)
        inside = (m < x_rows)[:, None] & (tl.arange(0, K) < left)[None, :]
        a = e4m3_value(tl.load(x_ptr + x_at + k, inside, other=0).to(tl.int32))  # [M, K]
        inside = (n < w_rows)[:, None] & (tl.arange(0, K // PER_BYTE) < left // PER_BYTE)[None, :]
        codes = tl.load(w_ptr + w_at + k // PER_BYTE, inside, other=0).to(tl.int32)
        b = e2m1_value(unpack_pairs(codes)) if PER_BYTE == 2 else e4m3_value(codes)  # [N, K]
        x_scale_at = m * x_groups + k // GROUP
        x_scale = scale_value(tl.load(x_scales_ptr + x_scale_at, m < x_rows, other=0))
        w_scale_at = (n // BLOCK_ROWS) * w_blocks + k // BLOCK_COLS
        w_scale = scale_value(tl.load(w_scales_ptr + w_scale_at, n < w_rows, other=0))
        # torch: out += (a @ b.T) * factor
        # float16 holds every E4M3 and E2M1 value exactly; the sums are float32.
        part = tl.dot(a.to(tl.float16), tl.trans(b.to(tl.float16)))
        acc += part * x_scale[:, None] * w_scale[None, :]
    inside = (m < x_rows)[:, None] & (n < w_rows)[None, :]
    at = m[:, None] * w_rows + n[None, :]
    tl.store(out_ptr + at, round_to(acc, out_ptr.dtype.element_ty), inside)


def fp8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    fmt: Format = FP8,
    group: int = ACT_GROUP,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See the definition, ``fp8_gemm_torch.fp8_gemm``."""
    check_fp8(fmt)
    return scaled_matmul(x, x_scales, weight, weight_scales, fmt, group, dtype)


def scaled_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    fmt: Format,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """See the definition, ``fp8_gemm_torch.scaled_matmul``."""
    rows, cols, step = check_operands(x, x_scales, weight, weight_scales, fmt, group, dtype)
    assert fmt.block is not None
    out = torch.zeros((*x.shape[:-1], rows), dtype=dtype, device=x.device)
    if out.numel() and cols:
        x_rows = out.numel() // rows
        m, n = dot_tile(x_rows), dot_tile(rows)
        _scaled_matmul_kernel[(triton.cdiv(rows, n), triton.cdiv(x_rows, m))](
            as_bytes(x).contiguous(),
            as_scales(x_scales).contiguous(),
            as_bytes(weight).contiguous(),
            as_scales(weight_scales).contiguous(),
            out,
            x_rows,
            rows,
            x_scales.shape[-1],
            weight_scales.shape[-1],
            COLS=cols,
            GROUP=group,
            BLOCK_ROWS=fmt.block[0],
            BLOCK_COLS=fmt.block[1],
            STEP=step,
            M=m,
            N=n,
            K=max(DOT_MIN, triton.next_power_of_2(step)),
            PER_BYTE=2 if fmt.kind == "fp4" else 1,
            **OPTIONS,
        )
    return out
