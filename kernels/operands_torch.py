"""How the operations read their operands; shared by all the definitions and all the twins.

Codes and E8M0 scales are bytes. PyTorch's one-byte types (``float8_e4m3fn``, ``float8_e8m0fnu``,
``float4_e2m1fn_x2``, ``int8``) are accepted wherever bytes are and mean the same bits, but results
are always plain ``uint8``, which every operation, numpy and the Triton interpreter can hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import e8m0
from dsv4_quant.formats.blocks import Format

FLOATS = (torch.float32, torch.bfloat16)
"""The types that activations and decoded weights can have."""


def as_bytes(codes: Tensor) -> Tensor:
    """The same memory as uint8; a TypeError for a type that is not one byte wide."""
    if codes.dtype.itemsize != 1 or codes.dtype == torch.bool:
        raise TypeError(f"expected one-byte codes, got {codes.dtype}")
    return codes.view(torch.uint8)


def as_scales(scales: Tensor) -> Tensor:
    """Scales as they are stored: float32, or E8M0 as uint8."""
    return scales if scales.dtype == torch.float32 else as_bytes(scales)


def scale_values(scales: Tensor) -> Tensor:
    """The float32 values of scales that are float32 already or E8M0 bytes."""
    scales = as_scales(scales)
    return lookup(scales, e8m0_table(scales.device)) if scales.dtype == torch.uint8 else scales


def e8m0_table(device: torch.device) -> Tensor:
    """The values of the 256 scale bytes, float32 ``[256]``."""
    return torch.tensor(e8m0.VALUES).to(device)


def lookup(codes: Tensor, table: Tensor) -> Tensor:
    """``table[codes]`` for uint8 codes; ``index_select`` is the fastest way torch has."""
    return table.index_select(0, codes.flatten().int()).view(*codes.shape, *table.shape[1:])


def check_float(x: Tensor) -> None:
    """A TypeError unless x has one of the types that activations can have."""
    if x.dtype not in FLOATS:
        raise TypeError(f"expected float32 or bfloat16, got {x.dtype}")


def check_group(group: int) -> None:
    """A ValueError for a group that is no group."""
    if group < 1:
        raise ValueError(f"a group holds at least one value, not {group}")


def weight_shape(codes: Tensor, scales: Tensor, fmt: Format) -> tuple[int, int]:
    """Rows and columns ``(N, K)`` of the weight ``[..., N, K]`` whose codes these are.

    ValueError where the scales do not fit the codes, or the format holds no codes at all.
    """
    if fmt.block is None or fmt.kind not in ("fp8", "fp4"):
        raise ValueError(f"{fmt} is not a block format")
    if fmt.kind == "fp4" and fmt.block[1] % 2:
        raise ValueError(f"{fmt}: a byte holds two codes, so a block must be even along K")
    rows, cols = codes.shape[-2], codes.shape[-1] * (2 if fmt.kind == "fp4" else 1)
    expected = (*codes.shape[:-2], *fmt.scale_shape((rows, cols)))
    if tuple(scales.shape) != expected:
        raise ValueError(f"{fmt}: scales are {tuple(scales.shape)}, expected {expected}")
    return rows, cols
