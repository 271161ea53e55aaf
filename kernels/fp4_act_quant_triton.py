"""fp4_act_quant, the twin: bit for bit what the definition gives."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.formats import e2m1
from dsv4_quant.kernels.defaults import FP4_AMAX_FLOOR, FP4_GROUP
from dsv4_quant.kernels.fp4_act_quant_torch import check_even
from dsv4_quant.kernels.launch_triton import OPTIONS, float_bits, fold_groups, tile_rows
from dsv4_quant.kernels.minifloat_triton import quantise_groups, widen
from dsv4_quant.kernels.operands_torch import check_float


@triton.jit
def _fp4_act_quant_kernel(
    x_ptr,
    packed_ptr,
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
    x = widen(tl.load(x_ptr + row[:, None] * cols + col[None, :], inside, other=0.0))
    codes, scales = quantise_groups(
        x, FLOOR_BITS, TOP_BITS, MANTISSA=1, BIAS=1, SIGN=0x8, NAN_CODE=0
    )
    # torch: packed = codes[..., 0::2] | codes[..., 1::2] << 4
    low, high = tl.split(tl.reshape(codes, (ROWS, LANES // 2, 2)))
    pair = tl.arange(0, LANES // 2)
    byte = group * (GROUP // 2) + pair
    inside = (row < rows)[:, None] & ((pair < GROUP // 2) & (byte < cols // 2))[None, :]
    at = row[:, None] * (cols // 2) + byte[None, :]
    tl.store(packed_ptr + at, (low | (high << 4)).to(tl.uint8), inside)
    tl.store(scales_ptr + row * groups + group, scales, row < rows)


def fp4_act_quant(x: Tensor, group: int = FP4_GROUP) -> tuple[Tensor, Tensor]:
    """See the definition, ``fp4_act_quant_torch.fp4_act_quant``."""
    check_float(x)
    check_even(x, group)
    groups = -(-x.shape[-1] // group)
    packed = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*x.shape[:-1], groups), dtype=torch.uint8, device=x.device)
    if x.numel():
        rows, cols = fold_groups(x.numel() // x.shape[-1], x.shape[-1], group)
        lanes = triton.next_power_of_2(group)
        tile = tile_rows(rows, lanes)
        groups = triton.cdiv(cols, group)
        _fp4_act_quant_kernel[(triton.cdiv(rows, tile), groups)](
            x.contiguous(),
            packed,
            scales,
            rows,
            cols,
            groups,
            GROUP=group,
            ROWS=tile,
            LANES=lanes,
            FLOOR_BITS=float_bits(FP4_AMAX_FLOOR),
            TOP_BITS=float_bits(e2m1.MAX),
            **OPTIONS,
        )
    return packed, scales
