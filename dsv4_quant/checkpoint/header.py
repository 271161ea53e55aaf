"""The safetensors header: a strict parser, and the writer whose bytes equal safetensors' own.

A file is 8 bytes of little-endian length N, N bytes of JSON padded with blanks, then tensor data.
The JSON maps names to ``{"dtype", "shape", "data_offsets": [begin, end]}``. This parser needs no
torch, and rejects what the safetensors library (0.8) lets through too: duplicate names, unknown
fields, leading blanks, names that are paths, floats where integers belong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dsv4_quant import strict_json
from dsv4_quant.errors import HeaderError
from dsv4_quant.strict_json import shown

MAX_HEADER_BYTES = 32 << 20
"""A 1.6 TB checkpoint in one file needs 19 MB; safetensors itself stops at 100 MB."""

MAX_HEADER_VALUES = 2_000_000
"""A tensor has at most 8, and the same checkpoint 1.2 million; bounds the memory of parsing."""

MAX_NAME_LENGTH = 512
MAX_DIMS = 8
MAX_SIZE = 1 << 50
"""No file is a petabyte: products of shapes beyond it are lies."""

_FIELDS = {"dtype", "shape", "data_offsets"}

# safetensors sorts a file's tensors by dtype in this order, then by name.
DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8",
    "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_ORDER)}
_BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32, "BF16": 16,
    "F16": 16, "U16": 16, "I16": 16, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor in a file; ``start`` and ``end`` count from the first byte of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors in the order of their data, and where the data starts."""

    entries: dict[str, Entry]
    data_start: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data."""
        return max((entry.end for entry in self.entries.values()), default=0)


def read_header(path: Path) -> Header:
    """Reads and checks the header of a file. Raises HeaderError that names file and tensor."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(8)
            if len(raw) < 8:
                _fail(f"The file has {size} bytes, too few for a safetensors header", path)
            length = int.from_bytes(raw, "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                _fail(
                    f"The header claims {length:,} bytes; the file has {size:,}"
                    f" and {MAX_HEADER_BYTES:,} is the most this tool reads",
                    path,
                    hint="Not a safetensors file, or a download that stopped early.",
                )
            text = file.read(length)
    except OSError as error:
        raise HeaderError(f"The file cannot be read: {error.strerror}", file=path) from None
    return parse_header(text, size - 8 - length, path)


def parse_header(text: bytes, data_bytes: int, path: Path | str) -> Header:
    """Checks a header's JSON against the size of the data that follows it."""
    if not text.startswith(b"{"):
        _fail("The header does not start with '{'", path, hint="Not a safetensors file.")
    try:
        pairs = strict_json.parse(text, max_values=MAX_HEADER_VALUES, integers_only=True)
    except ValueError as error:
        _fail(f"The header is not the JSON of a safetensors file: {error}", path)
    metadata = pairs.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail("__metadata__ is not an object of strings", path)
    _check_names(pairs, path)
    # true equals 1 where tuples are compared: a header with such a word is checked value by value
    kinds: _Kinds | None = None if b"true" in text or b"false" in text else {}
    entries = {name: _entry(name, value, kinds, path) for name, value in pairs.items()}
    bounds = [(entry.start, entry.end) for entry in entries.values()]
    if bounds != sorted(bounds):  # safetensors writes them in the order of their data
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_tiling(entries, data_bytes, path)
    return Header(entries, 8 + len(text), metadata)


_Kinds = dict[tuple[str, tuple[int, ...]], tuple[int, str, tuple[int, ...]]]
"""Bytes, dtype and shape by dtype and shape: those that have been checked. V4-Pro has 145,116
tensors of a few dozen kinds, and what is equal is held once."""


def _entry(name: str, value: Any, kinds: _Kinds | None, path: Path | str) -> Entry:
    """The entry, if it is one; of a kind that has been seen before, only the offsets are new."""
    if kinds:
        try:
            sizes, (start, end) = value["shape"], value["data_offsets"]
            size, dtype, shape = kinds[value["dtype"], tuple(sizes)]
            if end - start == size and len(value) == 3 and type(sizes) is list and end <= MAX_SIZE:
                return Entry(dtype, shape, start, end)
        except (KeyError, TypeError, ValueError):
            pass  # a new kind, or no entry at all
    entry = _checked(name, value, path)
    if kinds is not None:
        size = entry.end - entry.start
        kinds[entry.dtype, entry.shape] = size, entry.dtype, entry.shape
    return entry


def _checked(name: str, value: Any, path: Path | str) -> Entry:
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        found = sorted(value) if isinstance(value, dict) else value
        _fail(f"A header entry holds {shown(found)}, not dtype, shape, data_offsets", path, name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        _fail(f"Unknown dtype {shown(dtype)}", path, name)
    if type(shape) is not list or len(shape) > MAX_DIMS or not all(map(_is_size, shape)):
        _fail(f"The shape {shown(shape)} is not a list of sizes", path, name)
    if type(offsets) is not list or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _fail(f"data_offsets {shown(offsets)} are not [begin, end]", path, name)
    bits = prod(shape) * _BITS[dtype]
    if bits > 8 * MAX_SIZE or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        _fail(f"{dtype} {shape} does not fill data_offsets {offsets}", path, name)
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _check_names(names: Collection[str], path: Path | str) -> None:
    """All at once, for speed; one by one where that finds something."""
    joined = " ".join(names)
    longest = max(map(len, names), default=0)
    if "" not in names and longest <= MAX_NAME_LENGTH and _is_plain(joined):
        return
    for name in names:
        if not name or len(name) > MAX_NAME_LENGTH or not _is_plain(name):
            _fail(f"The tensor name {shown(name)} is empty, too long or a path", path)


def _is_plain(name: str) -> bool:
    return name.isprintable() and not ("/" in name or "\\" in name or ".." in name)


def _check_tiling(entries: dict[str, Entry], data_bytes: int, path: Path | str) -> None:
    """The tensors must cover the data exactly: no gap, no overlap, nothing after the last."""
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a gap"
            _fail(f"The data of a tensor {what} (at byte {entry.start:,}, not {end:,})", path, name)
        end = entry.end
    if end != data_bytes:
        _fail(
            f"The header describes {end:,} bytes of data, the file holds {data_bytes:,}",
            path,
            hint="Truncated by a stopped download or copy; fetch the file again."
            if end > data_bytes
            else "Something was appended to the file; fetch it again.",
        )


def _fail(
    what: str, path: Path | str, tensor: str | None = None, hint: str | None = None
) -> NoReturn:
    raise HeaderError(what, file=path, tensor=tensor, hint=hint)


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file (length included) for tensors (name, dtype, shape).

    Byte-identical to what safetensors writes without metadata: sorted by dtype and name, compact
    JSON, padded with blanks so that the data starts at a multiple of 8.
    """
    entries: dict[str, Entry] = {}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (DTYPE_RANK[t[1]], t[0])):
        start, end = end, end + prod(shape) * _BITS[dtype] // 8
        entries[name] = Entry(dtype, shape, start, end)
    rows = (
        f"{_quoted(name)}:{_spelt(e.dtype, e.shape)}{e.start},{e.end}]}}"
        for name, e in entries.items()
    )
    text = ("{" + ",".join(rows) + "}").encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, entries


_quoted = json.JSONEncoder(ensure_ascii=False).encode


@lru_cache(maxsize=1 << 10)
def _spelt(dtype: str, shape: tuple[int, ...]) -> str:
    """An entry's JSON up to its offsets: a checkpoint has a few dozen of these."""
    sizes = ",".join(map(str, shape))
    return f'{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":['
