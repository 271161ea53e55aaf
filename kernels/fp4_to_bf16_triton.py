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
