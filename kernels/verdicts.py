"""What the weight casts on a GPU answer about exactness: the numbers that the CPU casts use too."""

from __future__ import annotations

EXACT = 0
SPREAD = 1
"""A tile's verdict (fp4_to_fp8): a non-zero code is too small beside the tile's largest scale."""
UNDERFLOW = 2
"""A non-zero code, and the tile's scale would be smaller than 2**-127, the smallest E8M0."""
NAN_SCALE = 3
"""A scale byte of the tile is 0xFF."""

INEXACT = 1
"""Flag of a matrix (fp4_to_bf16, fp8_to_bf16): some value does not exist in BF16; what was written
is the nearest one."""
NAN = 2
"""Flag: a NaN was met, as a code or a scale."""
