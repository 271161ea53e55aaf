"""One colour per SQNR, read back from the image by other people's decoders."""

from __future__ import annotations

import math
import struct
import zlib

import pytest

from dsv4_quant.reports.colours import (
    ANCHORS,
    EXACT,
    FIRST,
    MISSING,
    PALETTE,
    STEP,
    TOP,
    UNDEFINED,
    colour,
    hexadecimal,
    index,
    ink,
)
from dsv4_quant.reports.png import address, png


def test_a_colour_means_the_same_everywhere() -> None:
    assert [index(v) for v in (None, math.inf, math.nan)] == [MISSING, EXACT, UNDEFINED]
    assert index(-math.inf) == index(-3.0) == index(0.0) == FIRST
    assert index(TOP) == index(200.0) == len(PALETTE) - 1 <= 255
    for i in range(FIRST, len(PALETTE)):
        assert index((i - FIRST) * STEP) == i
    for at, entry in ANCHORS:
        assert colour(at) == entry


def test_no_two_steps_and_no_special_entry_share_a_colour() -> None:
    scale = PALETTE[FIRST::5]  # 1 dB apart
    assert len(set(scale)) == len(scale)
    assert not {PALETTE[EXACT], PALETTE[UNDEFINED]} & set(PALETTE[FIRST:])


def luminance(entry: tuple[int, ...]) -> float:
    parts = [c / 255 for c in entry]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("entry", PALETTE[1:], ids=hexadecimal)
def test_text_on_every_colour_can_be_read(entry: tuple[int, int, int]) -> None:
    """WCAG 2.1, 1.4.3: a contrast of 4.5."""
    dark, light = sorted((luminance(entry), 0.0 if ink(entry) == "#000" else 1.0))
    assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 3), (384, 62), (256, 700)])
def test_png_holds_the_pixels(width: int, height: int) -> None:
    rows = [bytes((x * 7 + y * 13) % 256 for x in range(width)) for y in range(height)]
    palette = [(i, 255 - i, i // 2) for i in range(256)]
    image = png(rows, palette)
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(image):
        (length,) = struct.unpack_from(">I", image, at)
        kind, data = image[at + 4 : at + 8], image[at + 8 : at + 8 + length]
        (crc,) = struct.unpack_from(">I", image, at + 8 + length)
        assert crc == zlib.crc32(kind + data)
        chunks[kind], at = data, at + 12 + length
    assert list(chunks) == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (width, height, 8, 3, 0, 0, 0)
    assert chunks[b"PLTE"] == bytes(part for entry in palette for part in entry)
    assert zlib.decompress(chunks[b"IDAT"]) == b"".join(b"\0" + row for row in rows)
    assert address(image).startswith("data:image/png;base64,iVBORw0KGgo")
