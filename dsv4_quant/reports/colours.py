"""What a colour of the heat maps means: always the same SQNR, whatever the other cells hold.

From red (noise as strong as the values) by yellow (what 3 bits give) to blue, in which neither red
nor green tells apart what lightness does not; light blue is what FP4 gives, strong blue FP8. Exact
weights have a green of their own. The scale runs from 0 to 50 dB, in steps of 0.2.
"""

from __future__ import annotations

import math
from bisect import bisect

from dsv4_quant.reports.png import Colour

MISSING, EXACT, UNDEFINED = 0, 1, 2
FIRST, STEP, TOP = 3, 0.2, 50.0
STEPS = round(TOP / STEP)

ANCHORS: tuple[tuple[float, Colour], ...] = (
    (0, (0x8C, 0x00, 0x26)),
    (5, (0xC0, 0x14, 0x26)),
    (9, (0xE3, 0x4A, 0x33)),
    (12, (0xF7, 0x7F, 0x4A)),
    (14, (0xFD, 0xB4, 0x66)),
    (16, (0xFE, 0xE0, 0x90)),
    (17.5, (0xE6, 0xF0, 0xE0)),
    (19, (0xA9, 0xD3, 0xE8)),
    (22, (0x83, 0xBB, 0xDC)),
    (31, (0x42, 0x85, 0xC0)),
    (40, (0x2E, 0x5F, 0xA8)),
    (TOP, (0x23, 0x3F, 0x8A)),
)


def colour(sqnr: float) -> Colour:
    """Between the anchors in proportion."""
    held = min(max(sqnr, 0.0), TOP)
    right = min(bisect([at for at, _ in ANCHORS], held), len(ANCHORS) - 1)
    (low, one), (high, other) = ANCHORS[right - 1], ANCHORS[right]
    share = (held - low) / (high - low)
    mixed = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    red, green, blue = mixed
    return red, green, blue


PALETTE: tuple[Colour, ...] = (
    (0, 0, 0),
    (0x00, 0x9E, 0x73),
    (0x80, 0x80, 0x80),
    *(colour(i * STEP) for i in range(STEPS + 1)),
)


def index(sqnr: float | None) -> int:
    """The palette's entry of a SQNR in dB; None where there is no weight."""
    if sqnr is None:
        return MISSING
    if math.isnan(sqnr):
        return UNDEFINED
    if sqnr == math.inf:
        return EXACT
    return FIRST + round(min(max(sqnr, 0.0), TOP) / STEP)


def hexadecimal(entry: Colour) -> str:
    """``#a9d3e8``."""
    return "#" + bytes(entry).hex()


def ink(entry: Colour) -> str:
    """Black or white, whichever is read better on a colour (WCAG 2: relative luminance)."""
    linear = [
        part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in entry
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if luminance > 0.179 else "#fff"
