"""act_quant, the twin: bit for bit what the definition gives."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.formats import e4m3
from dsv4_quant.kernels.defaults import ACT_AMAX_FLOOR, ACT_GROUP
from dsv4_quant.kernels.launch_triton import OPTIONS, float_bits, fold_groups, tile_rows
from dsv4_quant.kernels.minifloat_triton import quantise_groups, widen
from dsv4_quant.kernels.operands_torch import check_float, check_group


@triton.jit
def _act_quant_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    cols,
    groups,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FLOOR_BITS: tl.constexpr,
    TOP_BITS: tl.constexpr,
):
    # One program: ROWS rows of one group, which is LANES wide, GROUP of them used.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    lane = tl.arange(0, LANES)
    col = group * GROUP + lane
    inside = (row < rows)[:, None] & ((lane < GROUP) & (col < cols))[None, :]
    at = row[:, None] * cols + col[None, :]
    x = widen(tl.load(x_ptr + at, inside, other=0.0))  # [ROWS, LANES]
    codes, scales = quantise_groups(
        x, FLOOR_BITS, TOP_BITS, MANTISSA=3, BIAS=7, SIGN=0x80, NAN_CODE=0x7F
    )
    tl.store(codes_ptr + at, codes.to(tl.uint8), inside)
    tl.store(scales_ptr + row * groups + group, scales, row < rows)


def act_quant(x: Tensor, group: int = ACT_GROUP) -> tuple[Tensor, Tensor]:
    """See the definition, ``act_quant_torch.act_quant``."""
    check_float(x)
    check_group(group)
    groups = -(-x.shape[-1] // group)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty((*x.shape[:-1], groups), dtype=torch.uint8, device=x.device)
    if x.numel():
        rows, cols = fold_groups(x.numel() // x.shape[-1], x.shape[-1], group)
        lanes = triton.next_power_of_2(group)
        tile = tile_rows(rows, lanes)
        groups = triton.cdiv(cols, group)
        _act_quant_kernel[(triton.cdiv(rows, tile), groups)](
            x.contiguous(),
            codes,
            scales,
            rows,
            cols,
            groups,
            GROUP=group,
            ROWS=tile,
            LANES=lanes,
            FLOOR_BITS=float_bits(ACT_AMAX_FLOOR),
            TOP_BITS=float_bits(e4m3.MAX),
            **OPTIONS,
        )
    return codes, scales
