"""fma: ``a * b + c`` rounded once, where PyTorch has no such operation.

The product of two float32 is exact in float64. Their sum with c need not be: it is rounded there,
and a second time to float32, which can differ from rounding once where the first rounding lands
half-way between two float32. So the first is to odd: of the two float64 beside the exact sum the
one whose last bit is 1. Such a value is never half-way, and lies on the exact sum's side of every
point that is, because float64 has more than twice as many bits as float32 and two more (Boldo and
Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

from __future__ import annotations

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` as IEEE 754 has it, rounded to nearest, subnormals included.

    Args:
        a, b, c: float32, of shapes that broadcast.

    Returns:
        float32. The bits of a NaN are unspecified.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    # Knuth's TwoSum: what the addition has lost, exactly; no float64 here is near its limits
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    is_even_and_inexact = (bits & 1 == 0) & (lost != 0) & total.isfinite()
    outwards = torch.where((lost > 0) == (total > 0), 1, -1)  # a larger magnitude has larger bits
    return (bits + outwards * is_even_and_inexact).view(torch.float64).float()
