"""A PNG of palette indices, the same bytes everywhere: stored, because compressors differ."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Sequence
from zlib import adler32, crc32

STORED = 0xFFFF
"""Bytes that a stored block of deflate (RFC 1951, 3.2.4) can hold."""

Colour = tuple[int, int, int]


def png(rows: Sequence[bytes], palette: Sequence[Colour]) -> bytes:
    """8 bits per pixel; index 0 is transparent. PNG 1.2 (RFC 2083)."""
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    colours = bytes(part for colour in palette for part in colour)
    pixels = b"".join(b"\0" + row for row in rows)
    chunks = ((b"IHDR", header), (b"PLTE", colours), (b"tRNS", b"\0"), (b"IDAT", _zlib(pixels)),
              (b"IEND", b""))  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))
        for kind, data in chunks
    )


def _zlib(data: bytes) -> bytes:
    """A zlib stream (RFC 1950) of stored blocks."""
    blocks = [data[i : i + STORED] for i in range(0, len(data), STORED)]
    stream = b"".join(
        struct.pack("<BHH", i == len(blocks) - 1, len(block), len(block) ^ STORED) + block
        for i, block in enumerate(blocks)
    )
    return b"\x78\x01" + stream + struct.pack(">I", adler32(data))


def address(image: bytes) -> str:
    """A ``data:`` address that holds the image itself."""
    return "data:image/png;base64," + b64encode(image).decode()
