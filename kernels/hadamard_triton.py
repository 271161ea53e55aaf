"""hadamard, the twin: bit for bit what the definition gives, because it adds in the same order."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.kernels.hadamard_torch import check_power_of_two
from dsv4_quant.kernels.launch_triton import OPTIONS, tile_rows
from dsv4_quant.kernels.minifloat_triton import round_to, widen
from dsv4_quant.kernels.operands_torch import check_float


@triton.jit
def _butterfly(y, ROWS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    # torch: low, high = y.view(..., size // (2 * stride), 2, stride).unbind(-2)
    # The pair goes last for split and join, and back afterwards.
    pairs = tl.reshape(y, (ROWS, SIZE // (2 * STRIDE), 2, STRIDE))
    low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    # torch: y = torch.stack((low + high, low - high), -2).flatten(-3)
    pairs = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
    return tl.reshape(pairs, (ROWS, SIZE))


@triton.jit
def _hadamard_kernel(
    x_ptr, y_ptr, rows, factor, ROWS: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (row < rows)[:, None]
    y = widen(tl.load(x_ptr + at, inside, other=0.0))  # [ROWS, SIZE]
    for stage in tl.static_range(STAGES):
        y = _butterfly(y, ROWS, SIZE, 2**stage)
    # torch: (y * math.pow(size, -0.5)).to(x.dtype)
    tl.store(y_ptr + at, round_to(y * factor, y_ptr.dtype.element_ty), inside)


def hadamard(x: Tensor) -> Tensor:
    """See the definition, ``hadamard_torch.hadamard``."""
    check_float(x)
    size = check_power_of_two(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rows = x.numel() // size
        tile = tile_rows(rows, size)
        _hadamard_kernel[(triton.cdiv(rows, tile),)](
            x.contiguous(),
            out,
            rows,
            math.pow(size, -0.5),
            ROWS=tile,
            SIZE=size,
            STAGES=size.bit_length() - 1,
            **OPTIONS,
        )
    return out
