"""What the stored numbers of one panel look like, counted at memory speed.

Three things are counted per block of a quantised weight (a *block* shares one scale):

- dead: every code is zero. A long stretch of them is a hole in a file, not a weight.
- saturated: half of the codes or more have the largest magnitude (6 or 448): a scale far too small.
- slack: the largest magnitude is at most a quarter of the format's largest (1.5 or 112): a scale
  far too large, which wastes two of the few bits. Dead blocks are not slack.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.formats.blocks import Tensor
from dsv4_quant.validators.scan_numba import (
    DEAD,
    DEAD_RUN,
    HALF_LANES,
    NANS,
    SATURATED,
    SINGLE_LANES,
    SLACK,
    Words,
    scan_fp4,
    scan_fp8,
    scan_plain,
)
from dsv4_quant.validators.tally import Tally

HUGE = 65536.0
"""No weight of a language model is as large; a flipped exponent bit makes such numbers."""


def scan(panel: Tensor, first_row: int) -> Tally:
    """Counts a panel of rows that begin at ``first_row`` of their weight."""
    kind = panel.format.kind
    if kind in ("fp4", "fp8"):
        return _scan_quantised(panel, first_row)
    tally = Tally(values=panel.codes.size)
    if kind == "i64":
        return tally
    plain = np.ascontiguousarray(panel.codes).reshape(1, -1).view(np.uint8)
    words = _as_words(plain, plain.size).reshape(-1)
    masks = HALF_LANES if kind == "bf16" else SINGLE_LANES
    suspicious, run = scan_plain(words, *masks)
    tally.zero_run = run * 8 // panel.codes.itemsize
    if suspicious:
        _look_closer(panel, first_row, tally)
    return tally


def _look_closer(panel: Tensor, first_row: int, tally: Tally) -> None:
    """Counts and finds what is not finite, or beyond all measure."""
    decoded = panel.decode()
    values = decoded.reshape(-1, decoded.shape[-1])
    finite = np.isfinite(values)
    tally.note_bad(~finite, first_row, values)
    tally.note_huge(finite & (np.abs(values) >= HUGE), first_row, values)


def _scan_quantised(panel: Tensor, first_row: int) -> Tally:
    form, codes, scales = panel.format, panel.codes, panel.scales
    assert form.block is not None and scales is not None
    b, c = form.block[0], min(form.block[1], panel.shape[1])
    counts = np.zeros(5, np.int64)
    exponents = np.zeros(256, np.int64)
    exponent = scales if form.scale == "e8m0" else (scales.view(np.uint32) >> 23).astype(np.uint8)
    if form.kind == "fp4":
        scan_fp4(_as_words(codes, c // 2), exponent, counts, exponents)
    else:
        scan_fp8(_as_words(codes, c), exponent, b, -(-c // 8), c * b, counts, exponents)
    tally = Tally(values=codes.size * (2 if form.kind == "fp4" else 1), blocks=scales.size)
    tally.dead, tally.saturated = int(counts[DEAD]), int(counts[SATURATED])
    tally.slack, tally.zero_run = int(counts[SLACK]), int(counts[DEAD_RUN]) * b * c
    tally.exponents = exponents
    if counts[NANS]:
        is_nan = (codes & 0x7F) == e4m3.NAN_CODES[0]
        tally.note_bad(is_nan, first_row, codes)
    is_e8m0 = form.scale == "e8m0"
    bad = scales == e8m0.NAN if is_e8m0 else ~(np.isfinite(scales) & (scales > 0))
    if bad.any():
        tally.note_scales(bad, first_row // b, scales)
    return tally


def _as_words(codes: NDArray[Any], block_bytes: int) -> Words:
    """``[R, bytes]`` -> ``[R, words]``: each block's bytes padded with zeros to whole words."""
    rows, width = codes.shape
    padded = -(-block_bytes // 8) * 8
    if block_bytes == padded and width % padded == 0:
        return np.ascontiguousarray(codes).view(np.uint64)
    blocks = -(-width // block_bytes)
    whole = np.zeros((rows, blocks * block_bytes), np.uint8)
    whole[:, :width] = codes
    out = np.zeros((rows, blocks, padded), np.uint8)
    out[:, :, :block_bytes] = whole.reshape(rows, blocks, block_bytes)
    return out.reshape(rows, -1).view(np.uint64)
