"""The header: writing as safetensors does, byte for byte; reading more strictly than it does."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, TensorSpec, deserialize, serialize
from safetensors.torch import save

from dsv4_quant.checkpoint.header import (
    DTYPE_ORDER,
    MAX_HEADER_BYTES,
    Header,
    build_header,
    parse_header,
    read_header,
)
from dsv4_quant.errors import HeaderError

# Every dtype that safetensors 0.8 can write: its name in files -> its name in Python, bits.
WRITABLE = {
    "BOOL": ("bool", 8), "U8": ("uint8", 8), "I8": ("int8", 8), "I16": ("int16", 16),
    "U16": ("uint16", 16), "F16": ("float16", 16), "BF16": ("bfloat16", 16), "I32": ("int32", 32),
    "U32": ("uint32", 32), "F32": ("float32", 32), "F64": ("float64", 64), "I64": ("int64", 64),
    "U64": ("uint64", 64), "C64": ("complex64", 64), "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2": ("float8_e5m2", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8), "F8_E8M0": ("float8_e8m0fnu", 8),
    "F4": ("float4_e2m1fn_x2", 4),
}  # fmt: skip

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def size(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * WRITABLE[dtype][1] // 8


def by_safetensors(tensors: Tensors) -> bytes:
    """The file that safetensors writes; its data counts up, so that slices can be told apart."""
    specs, alive = {}, []
    for name, (dtype, shape) in tensors.items():
        data = np.arange(max(1, size(dtype, shape)), dtype=np.uint8)
        alive.append(data)
        held = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
        specs[name] = TensorSpec(
            dtype=WRITABLE[dtype][0],
            shape=held,
            data_ptr=data.ctypes.data,
            data_len=size(dtype, shape),
        )
    return bytes(serialize(specs, None))


def parts(file: bytes) -> tuple[bytes, bytes]:
    """A file's header text and its data."""
    length = int.from_bytes(file[:8], "little")
    return file[8 : 8 + length], file[8 + length :]


@contextmanager
def at_most(mebibytes: int) -> Iterator[None]:
    """What Python allocates inside stays below a bound at every moment."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < mebibytes << 20


def entry(start: int = 0, end: int = 4, **other: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]} | other


def parse(header: Any, data: int = 4) -> Header:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(text, data, "m.safetensors")


def refused(header: Any, says: str = "", data: int = 4) -> None:
    """Refused, by a short printable paragraph, that the file is named in."""
    with pytest.raises(HeaderError) as caught:
        parse(header, data)
    text = str(caught.value)
    assert says in text and "m.safetensors" in text
    assert text.isprintable() and len(text) < 1200


# --- writing -------------------------------------------------------------------------------------

names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0") | st.sampled_from('abc.019"\\\x7f\x1f/'),
    min_size=1,
    max_size=12,
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def tensor_sets(draw: st.DrawFn, keys: st.SearchStrategy[str] = names) -> Tensors:
    found: Tensors = {}
    for name in draw(st.lists(keys, unique=True, max_size=12)):
        dtype, shape = draw(st.sampled_from(sorted(WRITABLE))), draw(shapes)
        if dtype == "F4":
            shape = (*(shape or (1,))[:-1], 2 * (shape or (1,))[-1])
        if name != "__metadata__":
            found[name] = (dtype, shape)
    return found


@settings(max_examples=300, deadline=None)
@given(tensor_sets())
@example({})
@example({"é": ("F4", (2, 8)), "e": ("BF16", ()), "\U0001f600": ("U8", (0,)), "￿": ("U8", (1,))})
def test_bytes_equal_those_of_safetensors(tensors: Tensors) -> None:
    file = by_safetensors(tensors)
    ours, entries = build_header((name, dtype, shape) for name, (dtype, shape) in tensors.items())
    text, data = parts(file)
    assert ours == file[: 8 + len(text)]
    assert len(ours) % 8 == 0
    assert sum(e.end - e.start for e in entries.values()) == len(data)


def test_dtypes_are_ordered_as_safetensors_orders_them() -> None:
    """All at once, named so that the names would order them otherwise."""
    forwards = {f"{i:02}": (dtype, (8,)) for i, dtype in enumerate(sorted(WRITABLE))}
    text, _ = parts(by_safetensors(forwards))
    written = [value["dtype"] for value in json.loads(text).values()]
    assert written == [dtype for dtype in DTYPE_ORDER if dtype in WRITABLE]
    assert set(DTYPE_ORDER) - set(WRITABLE) == {"F6_E3M2", "F6_E2M3"}  # readable, not writable


def test_bytes_equal_those_of_safetensors_torch() -> None:
    """The dtypes of these checkpoints, through the call that the published converter makes."""
    state = {
        "layers.0.ffn.gate.tid2eid": torch.zeros(6, 2, dtype=torch.int64),
        "layers.0.attn.attn_sink": torch.zeros(4),
        "norm.weight": torch.zeros(8, dtype=torch.bfloat16),
        "layers.0.attn.wq_a.scale": torch.zeros(1, 2, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "layers.0.attn.wq_a.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn),
        "layers.0.ffn.experts.0.w1.weight": torch.zeros(4, 8, dtype=torch.int8),
        "layers.0.ffn.experts.1.w1.weight": torch.zeros(4, 8, dtype=torch.uint8).view(
            torch.float4_e2m1fn_x2
        ),
    }
    tensors = [
        ("layers.0.ffn.experts.0.w1.weight", "I8", (4, 8)),
        ("norm.weight", "BF16", (8,)),
        ("layers.0.attn.wq_a.weight", "F8_E4M3", (4, 8)),
        ("layers.0.attn.attn_sink", "F32", (4,)),
        ("layers.0.ffn.experts.1.w1.weight", "F4", (4, 16)),
        ("layers.0.ffn.gate.tid2eid", "I64", (6, 2)),
        ("layers.0.attn.wq_a.scale", "F8_E8M0", (1, 2)),
    ]
    file = save(state)
    ours, entries = build_header(tensors)
    assert file[: len(ours)] == ours
    assert [entry.dtype for entry in entries.values()] == [
        "I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8", "F4",
    ]  # fmt: skip


# --- reading what is sound -----------------------------------------------------------------------

plain_names = st.text(st.sampled_from("abc.019_"), min_size=1, max_size=12).filter(
    lambda name: ".." not in name
)


@settings(max_examples=200, deadline=None)
@given(tensor_sets(plain_names))
def test_reads_what_safetensors_writes(tensors: Tensors) -> None:
    file = by_safetensors(tensors)
    text, data = parts(file)
    header = parse_header(text, len(data), "x")
    assert {n: (e.dtype, e.shape) for n, e in header.entries.items()} == tensors
    assert header.data_start == 8 + len(text) and header.data_bytes == len(data)
    starts = [e.start for e in header.entries.values()]
    assert starts == sorted(starts)
    rebuilt, entries = build_header((n, d, s) for n, (d, s) in tensors.items())
    assert rebuilt == file[: len(rebuilt)] and entries == header.entries


def test_order_of_entries_and_fields_is_free() -> None:
    header = parse(
        b' {"b":{"data_offsets":[4,8],"shape":[2],"dtype":"BF16"}, "a" :'.lstrip()
        + b'{"shape":[1],"dtype":"F32","data_offsets":[0,4]}}   ',
        data=8,
    )
    assert list(header.entries) == ["a", "b"]


def test_metadata_is_kept() -> None:
    header = parse({"__metadata__": {"format": "pt", "é": "\U0001f600"}, "a": entry()})
    assert header.metadata == {"format": "pt", "é": "\U0001f600"} and list(header.entries) == ["a"]


def test_scalars_and_empty_tensors() -> None:
    header = parse({"s": entry(shape=[]), "e": entry(4, 4, shape=[0, 7]), "f": entry(0, 0)})
    assert header.entries["s"].shape == () and header.entries["e"].shape == (0, 7)


def test_an_empty_file_has_no_tensors() -> None:
    assert parse({}, data=0) == Header({}, 10)
    assert parse({}, data=0).data_bytes == 0


@pytest.mark.parametrize("case", ["tiny-fp4", "tiny-base"])
def test_published_layout(case: str) -> None:
    """The golden shards: no metadata, and rebuilt from their tensors byte for byte."""
    for path in (Path(__file__).parent.parent / "golden" / case / "checkpoint").glob(
        "*.safetensors"
    ):
        header = read_header(path)
        rebuilt, _ = build_header((n, e.dtype, e.shape) for n, e in header.entries.items())
        assert path.read_bytes()[: header.data_start] == rebuilt
        assert not header.metadata


# --- refusing ------------------------------------------------------------------------------------

LET_THROUGH = {
    "duplicate name": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
                      b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "duplicate metadata": b'{"__metadata__":{"a":"1","a":"2"},'
                          b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "unknown field": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"scale":2}}',
    "path up": b'{"../../a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "absolute path": b'{"/etc/passwd":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "backslash": b'{"a\\\\b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "NUL": b'{"a\\u0000b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "newline": b'{"a\\nb":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "terminal escape": b'{"a\\u001b[2J":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "right to left": b'{"a\\u202eb":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "empty name": b'{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "endless name": b'{"' + b"a" * 513 + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "null metadata": b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "nine dimensions": b'{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}',
}  # fmt: skip


@pytest.mark.parametrize("case", LET_THROUGH)
def test_what_safetensors_lets_through_is_refused(case: str) -> None:
    text = LET_THROUGH[case]
    deserialize(len(text).to_bytes(8, "little") + text + bytes(4))  # it does let it through
    refused(text)


def test_leading_blanks_are_refused() -> None:
    text = b"  " + json.dumps({"a": entry()}).encode()
    refused(text, "does not start with '{'")


NOT_SIZES = [
    -1, 1.0, 1.5, True, False, None, "4", [4], {}, 2**63, 2**64, 2**64 + 4, 10**30, -(2**63), 1e300,
]  # fmt: skip


@pytest.mark.parametrize("value", NOT_SIZES, ids=repr)
def test_no_size_in_shape_or_offsets(value: Any) -> None:
    refused({"a": entry(shape=[value])})
    refused({"a": entry(shape=[1, value])})
    refused({"a": entry(data_offsets=[0, value])})
    refused({"a": entry(data_offsets=[value, 4])})
    refused({"a": entry(shape=value)})
    refused({"a": entry(data_offsets=value)})


@pytest.mark.parametrize("value", [None, "f32", "F33", "", 4, ["F32"], {}, True, "F" * 10_000])
def test_no_dtype(value: Any) -> None:
    refused({"a": entry(dtype=value)}, "Unknown dtype")


@pytest.mark.parametrize("value", [None, [], "x", 1, {}, {"dtype": "F32"}, [entry()], True])
def test_no_entry(value: Any) -> None:
    refused({"a": value}, "not dtype, shape, data_offsets. (file m.safetensors, tensor a)")


@pytest.mark.parametrize("value", [[], "x", 1, {"a": 1}, {"a": None}, {"a": {}}, {"a": "\ud800"}])
def test_no_metadata(value: Any) -> None:
    refused({"__metadata__": value, "a": entry()})


SCALAR = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "second",
    [
        entry(4, 8, shape=[True]), entry(4, 8, shape=["1"]), entry(4, 8, shape=[[1]]),
        entry(4, 8, shape=""), entry(4, 8, shape={}), entry(4, 8, shape=None),
        entry(4, 8, data_offsets=[4]), entry(4, 8, data_offsets=[4, 8, 8]),
        entry(4, 8, data_offsets=[4, "8"]), entry(4, 8, data_offsets={"4": 0, "8": 0}),
        entry(4, 8, data_offsets="48"), entry(4, 8, data_offsets=[True, 8]),
        entry(4, 8, dtype=["F32"]), entry(4, 8, extra=0), [4, 8], "shape",
    ],
    ids=repr,
)  # fmt: skip
def test_a_kind_seen_before_lets_nothing_through(second: Any) -> None:
    """What is equal is checked once: only what is really equal."""
    refused({"a": entry(0, 4), "b": second}, data=8)
    refused({"a": SCALAR, "b": second}, data=8)
    refused({"a": entry(0, 4), "b": second, "is true or false": entry(8, 12)}, data=12)


def test_equal_kinds_share_one_shape() -> None:
    entries = parse({"true": entry(0, 8), "b": entry(8, 16)}, data=16).entries
    assert entries["true"].shape == entries["b"].shape == (2,)
    entries = parse({"a": entry(0, 8), "b": entry(8, 16)}, data=16).entries
    assert entries["a"].shape is entries["b"].shape and entries["b"][2:] == (8, 16)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "leaves a gap"),
        ({"a": entry(4, 8)}, 8, "leaves a gap"),
        ({"a": entry(data_offsets=[4, 0])}, 4, "does not fill"),
        ({"a": entry(0, 8)}, 4, "Truncated by a stopped download"),
        ({"a": entry(0, 4)}, 8, "Something was appended"),
        ({}, 1, "Something was appended"),
        ({"a": entry(shape=[2])}, 4, "does not fill"),
        ({"a": entry(0, 0, shape=[])}, 0, "does not fill"),
        ({"a": entry(shape=[2**40, 2**40, 0])}, 4, "does not fill"),
        ({"a": entry(shape=[2**32, 2**32])}, 4, "does not fill"),
        ({"a": entry(dtype="I64", shape=[2**50, 2**11])}, 4, "does not fill"),
        ({"a": entry(0, 1, dtype="F4", shape=[3])}, 1, "does not fill"),
        ({"a": entry(0, 2**49 + 1)}, 4, "does not fill"),
        ({"a": entry(0, 2**49)}, 4, "Truncated"),
        ({"a": entry(data_offsets=[0])}, 4, "not [begin, end]"),
        ({"a": entry(data_offsets=[0, 4, 8])}, 4, "not [begin, end]"),
    ],
)
def test_offsets_that_do_not_tile_the_data(header: Any, data: int, says: str) -> None:
    refused(header, says, data)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"null", b'"a"', b"{", b"{}{}", b'{"a":}', b"{'a':1}", b"{\xff}", b'{"a":1,}',
        b'{"a":{"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}',
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","shape":[' + b"4" * 5000 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"a":{"dtype":"U8","shape":' + b"[" * 950 + b"]" * 950 + b',"data_offsets":[0,4]}}',
        b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    ],
    ids=range(19),
)  # fmt: skip
def test_no_json_of_a_header(text: bytes) -> None:
    refused(text)


def write(path: Path, length: int, text: bytes, data: bytes = b"") -> Path:
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "length", [2**63, 2**63 - 1, 2**64 - 1, 2**32, 10**9, MAX_HEADER_BYTES + 1, 100]
)
def test_a_length_beyond_the_file_is_refused_unread(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", length, b"{}")
    with at_most(1), pytest.raises(HeaderError, match="claims"):
        read_header(path)


def test_a_length_that_the_file_has_but_no_model_needs(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", MAX_HEADER_BYTES + 1, b"{}")
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with at_most(1), pytest.raises(HeaderError, match="claims"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567", bytes(8), b"\x01" + bytes(7) + b"{"])
def test_files_too_short_for_a_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(HeaderError, match="cannot be read"):
            read_header(path)


def test_huge_headers_of_nonsense_are_bounded_in_time_and_memory() -> None:
    """32 MiB of the costliest values that fit: far below a gigabyte, a few seconds."""
    many = (MAX_HEADER_BYTES - 100) // 8
    for unit in (b"[],", b'{"a":1},', b'"abcdef",'):
        text = (b'{"a":[' + unit * (many * 8 // len(unit))).ljust(MAX_HEADER_BYTES - 2, b" ")
        start = time.process_time()
        with at_most(1):
            refused(text, "more than 2,000,000 values")
        assert time.process_time() - start < 1
    text = b'{"a":[' + b"[]," * 660_000 + b"[]]}"
    start = time.process_time()
    refused(text, "tensor a")
    assert time.process_time() - start < 5


# --- fuzz: our view is safetensors' view, or a HeaderError ---------------------------------------

BASE = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [16, 22]},
    "a.scale": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    "b": {"dtype": "BF16", "shape": [6], "data_offsets": [4, 16]},
    "e": {"dtype": "U8", "shape": [0], "data_offsets": [22, 22]},
}
DATA = bytes(range(22))


def agrees_or_refuses(text: bytes, data: bytes) -> None:
    try:
        header = parse_header(text, len(data), "m.safetensors")
    except HeaderError as error:
        assert str(error).isprintable() and len(str(error)) < 1200
        return
    try:
        theirs = dict(deserialize(len(text).to_bytes(8, "little") + text + data))
    except SafetensorError as error:  # never accept what safetensors refuses
        raise AssertionError(f"safetensors refuses it: {error}") from None
    ours = {
        name: (e.dtype, list(e.shape), data[e.start : e.end]) for name, e in header.entries.items()
    }
    assert ours == {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in theirs.items()}


@settings(max_examples=400, deadline=5000)
@given(st.data())
def test_fuzz_bytes(data: st.DataObject) -> None:
    text = bytearray(json.dumps(BASE, separators=(",", ":")).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        new = data.draw(st.binary(max_size=2) | st.sampled_from(
            [b"0", b"1", b"-", b".", b"e", b'"', b"[", b"]", b"{", b"}", b",", b" ", b"null", b"\n",
             b"16", b"22", b"\\u0061", b"F32", b"true", b'"x":1,', b"\\"]))  # fmt: skip
        text[at : at + cut] = new
    agrees_or_refuses(bytes(text), DATA)


VALUES = st.recursive(
    st.sampled_from(["F32", "U8", "F4", "BOOL", "", "..", "a/b", 0, 1, 2, 4, 6, 12, 16, 22, 23, -1,
                     2**31, 2**50, 2**63, 2**64, 0.0, 4.0, True, False, None]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["dtype", "shape", "data_offsets", "x", "__metadata__"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=400, deadline=5000)
@given(st.data())
def test_fuzz_structure(data: st.DataObject) -> None:
    header: dict[str, Any] = json.loads(json.dumps(BASE))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([*header, "new", "é", "a b", "../x", "x" * 600]))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x", None]))
        value = data.draw(VALUES)
        if field is None or not isinstance(header.get(name), dict):
            header[name] = value
        else:
            header[name][field] = value
    text = json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode()
    size = data.draw(st.sampled_from([22, 22, 22, 0, 21, 23, 16]))
    agrees_or_refuses(text, bytes(range(size)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_fuzz_sound_headers_with_moved_offsets(data: st.DataObject) -> None:
    tensors = data.draw(tensor_sets(plain_names))
    text, payload = parts(by_safetensors(tensors))
    header = json.loads(text)
    if header:
        name = data.draw(st.sampled_from(sorted(header)))
        which = data.draw(st.sampled_from([0, 1]))
        header[name]["data_offsets"][which] += data.draw(st.integers(-8, 8))
    agrees_or_refuses(json.dumps(header).encode(), payload)


@given(st.binary(max_size=64))
def test_fuzz_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except HeaderError as error:
        assert str(path) in str(error)
    else:
        assert header.data_start + header.data_bytes == len(content)
