"""ordered_gemm, the twin: bit for bit what the definition gives (the bits of a NaN aside).

Fused multiply-adds of float32 on the ordinary cores: tensor cores sum in an order of their own.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.kernels.launch_triton import OPTIONS
from dsv4_quant.kernels.ordered_gemm_torch import BLOCK, LANES, check_ordered

SIDE = 32
"""Rows and columns of a tile: 128 sums in each of 128 threads, as many as their registers hold."""

STAGES = 4
"""Steps along K whose operands are on their way while one is computed."""


@triton.jit
def _sum_lanes(x):
    # torch: while n > 1: n //= 2; x = x[..., :n] + x[..., n:]   [M, N, L] -> [M, N]
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    L: tl.constexpr = x.shape[2]
    if L > 1:
        halves = tl.permute(tl.reshape(x, (M, N, 2, L // 2)), (0, 1, 3, 2))
        first, second = tl.split(halves)
        total = _sum_lanes(first + second)
    else:
        total = tl.reshape(x, (M, N))
    return total


@triton.jit(do_not_specialize=["x_rows", "w_rows", "block"])
def _ordered_gemm_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    x_rows,
    w_rows,
    cols,
    block,
    M: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    # One program: a tile [M, N] of the result, each of its sums in LANES lanes.
    m = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    n = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    lane = tl.arange(0, LANES)
    x_at = x_ptr + m[:, None] * cols + lane[None, :]
    w_at = w_ptr + n[:, None] * cols + lane[None, :]
    y = tl.zeros((M, N), tl.float32)
    for start in range(0, cols, block):
        lanes = tl.zeros((M, N, LANES), tl.float32)
        # torch: lanes = fma(x[:, None, k : k + LANES], w[:, k : k + LANES], lanes)
        # Beyond K both are 0, and a lane with 0 * 0 added is what it was (or +0 for -0).
        stop = tl.minimum(start + block, cols)
        for k in tl.range(start, stop, LANES, num_stages=STAGES):
            inside = (lane < cols - k)[None, :]
            x = tl.load(x_at + k, (m < x_rows)[:, None] & inside, other=0.0)  # [M, LANES]
            w = tl.load(w_at + k, (n < w_rows)[:, None] & inside, other=0.0)  # [N, LANES]
            lanes = tl.fma(x[:, None, :], w[None, :, :], lanes)
        y += _sum_lanes(lanes)
    at = m[:, None] * w_rows + n[None, :]
    tl.store(y_ptr + at, y, (m < x_rows)[:, None] & (n < w_rows)[None, :])


def ordered_gemm(x: Tensor, w: Tensor, block: int | None = BLOCK) -> Tensor:
    """See the definition, ``ordered_gemm_torch.ordered_gemm``."""
    x_rows, w_rows, cols = check_ordered(x, w, block)
    y = torch.zeros(x_rows, w_rows, device=x.device)
    if y.numel() and cols:
        m, n = (min(SIDE, triton.next_power_of_2(rows)) for rows in (x_rows, w_rows))
        _ordered_gemm_kernel[(triton.cdiv(x_rows, m), triton.cdiv(w_rows, n))](
            x.contiguous(),
            w.contiguous(),
            y,
            x_rows,
            w_rows,
            cols,
            block or cols,
            M=m,
            N=n,
            LANES=LANES,
            STAGES=STAGES,
            **OPTIONS,
        )
    return y
