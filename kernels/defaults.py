"""The sizes and floors of the published quantisers, in one place.

Every operation takes them as arguments; these are what it takes when nothing is said. A release
with other blocks (32x32, say) passes its own.
"""

from __future__ import annotations

from dsv4_quant.config import FP8_BLOCK
from dsv4_quant.formats.blocks import FP4, fp8

FP8 = fp8(FP8_BLOCK)
"""Format of an FP8 weight with E8M0 scales."""

ACT_GROUP = FP8_BLOCK[1]
"""Values along K that share a scale in act_quant: as many as a weight block is wide."""

ACT_AMAX_FLOOR = 1e-4
"""act_quant takes no group for smaller than this (as float32), so that zeros get a scale too."""

assert FP4.block is not None
FP4_GROUP = FP4.block[1]
"""Values along K that share a scale in fp4_act_quant."""

FP4_AMAX_FLOOR = 6 * 2.0**-126
"""The same for fp4_act_quant: its smallest scale is 2**-126, the smallest normal float32."""
