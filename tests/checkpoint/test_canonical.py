"""The same values have the same canonical bytes, whatever they are stored as."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsv4_quant.checkpoint.canonical import Canonical
from dsv4_quant.formats import e2m1
from dsv4_quant.formats.blocks import BF16, F32, FP4, Tensor, fp8

Bytes = NDArray[np.uint8]
FP8_OF_FP4 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(
    ml_dtypes.float8_e4m3fn
).view(np.uint8)  # fmt: skip
"""FP4 code -> the FP8 code of the same value."""


def in_fp4(codes: Bytes, scales: Bytes) -> Tensor:
    return Tensor(FP4, codes.shape, e2m1.pack(codes), scales)


def storages(codes: Bytes, scales: Bytes) -> dict[str, Tensor]:
    """Codes ``[R, C]`` and a scale per 32 columns, as everything that holds their values."""
    fp4, by_group = in_fp4(codes, scales), fp8((1, 32))
    values = fp4.decode()
    assert not (values.view(np.uint32) & 0xFFFF).any()  # BF16 has FP4's digits and more
    half = (values.view(np.uint32) >> 16).astype(np.uint16)
    wide = np.ldexp(np.float32(1), scales.astype(np.int64) - 127).astype(np.float32)
    return {
        "fp4": fp4,
        "fp8, e8m0": Tensor(by_group, codes.shape, FP8_OF_FP4[codes], scales),
        "fp8, f32": Tensor(fp8((1, 32), "f32"), codes.shape, FP8_OF_FP4[codes], wide),
        "bf16": Tensor(BF16, codes.shape, half),
        "f32": Tensor(F32, codes.shape, values),
    }


def leaf(tensor: Tensor, start: int = 0, stop: int | None = None) -> tuple[int, bytes] | None:
    found = Canonical().leaf(tensor, start, tensor.shape[0] if stop is None else stop)
    return found and (found[0], found[1].tobytes())


def agreed(
    codes: Bytes, scales: Bytes, start: int = 0, stop: int | None = None
) -> tuple[int, bytes]:
    """Bits and bytes on which all storages agree."""
    found = {name: leaf(held, start, stop) for name, held in storages(codes, scales).items()}
    first = found["fp4"]
    assert first is not None
    assert not [name for name, other in found.items() if other != first]
    return first


@pytest.mark.parametrize("byte", [0, 1, 2, 3, 8, 9, 10, 127, 246, 247, 251, 252, 253, 254])
@pytest.mark.parametrize("code", range(16))
def test_every_code_where_a_format_ends(byte: int, code: int) -> None:
    """Alone among zeros: 4 bits but for what float32 does not hold."""
    codes = np.zeros((2, 64), np.uint8)
    codes[1, code] = code
    scales = np.array([[127, 3], [byte, 127]], np.uint8)
    bits, _ = agreed(codes, scales)
    value = float(in_fp4(codes, scales).decode()[1, code])
    assert bits == (16 if np.isinf(value) else 4)


@pytest.mark.parametrize("byte", range(255))
def test_every_scale(byte: int) -> None:
    rng = np.random.default_rng(byte)
    codes = rng.integers(0, 16, (6, 128), np.uint8)
    codes &= np.array([15, 14, 13, 12, 11, 9], np.uint8)[:, None]
    scales = np.full((6, 4), byte, np.uint8)
    for row in range(6):
        agreed(codes, scales, row, row + 1)
    assert agreed(codes, scales)[0] == (4 if byte <= 252 else 16)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_panel(data: st.DataObject) -> None:
    rows, groups = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 16, (rows, 32 * groups), np.uint8)
    masks = np.array(data.draw(st.sampled_from([[15], [8, 15], [9, 11, 12, 15]])), np.uint8)
    codes &= rng.choice(masks, codes.shape)
    low, high = sorted((data.draw(st.integers(0, 254)), data.draw(st.integers(0, 254))))
    scales = rng.integers(low, high + 1, (rows, groups), np.uint8)
    start = data.draw(st.integers(0, rows - 1))
    agreed(codes, scales, start, data.draw(st.integers(start + 1, rows)))


@pytest.mark.parametrize("cols", [2, 16, 48, 70])
def test_ragged_groups_have_no_fp4_form(cols: int) -> None:
    """Rows whose last group is short; every format stores them, and the digest takes BF16."""
    rng = np.random.default_rng(cols)
    codes = rng.integers(0, 16, (5, cols), np.uint8)
    scales = rng.integers(100, 140, (5, -(-cols // 32)), np.uint8)
    assert agreed(codes, scales)[0] == 16


@pytest.mark.parametrize(("row", "bits"), [(0, 0x3F90), (6, 0x3F90), (6, 0x7F80), (6, 0x3F82)])
def test_one_value_makes_a_leaf_bf16(row: int, bits: int) -> None:
    """1.125, infinity, 1.015625: the leaf that holds it, and no other."""
    half = np.full((7, 32), 0x3F80, np.uint16)
    half[row, 9] = bits
    tensor = Tensor(BF16, half.shape, half)
    for first in range(7):
        found = leaf(tensor, first, first + 1)
        assert found is not None and found[0] == (16 if first == row else 4)
    assert leaf(tensor) == (16, half.tobytes())


def test_vectors_and_minus_zero() -> None:
    ones = np.full(64, 0xBF80, np.uint16)
    ones[5:40] = 0x8000
    found = Canonical().leaf(Tensor(BF16, (64,), ones), 0, 1)
    codes = np.where(ones == 0x8000, 0, 15).astype(np.uint8)  # -1 is -6 / 6, that is 4 / 4
    assert found is not None and found[0] == 4
    codes[codes == 15] = 14
    assert found[1].tobytes() == e2m1.pack(codes).tobytes() + bytes([125, 125])
    other = Canonical().leaf(Tensor(BF16, (3,), ones[4:7].copy()), 0, 1)
    assert other is not None and other[0] == 16
    assert other[1].tolist() == [[0xBF80, 0, 0]]


def nan_cases() -> dict[str, Tensor]:
    codes, scales = np.full((4, 64), 7, np.uint8), np.full((4, 2), 127, np.uint8)
    fine = storages(codes, scales)
    found: dict[str, Tensor] = {}
    for name in ("fp4", "fp8, e8m0", "fp8, f32"):
        held = fine[name]
        assert held.scales is not None
        bad: NDArray[Any] = held.scales.copy()
        bad[2, 1] = np.nan if held.format.scale == "f32" else 0xFF
        found[f"{name}: scale"] = Tensor(held.format, held.shape, held.codes, bad)
    endless, fp8_codes = np.full((4, 2), 1.1, np.float32), fine["fp8, f32"].codes
    endless[2, 1] = np.inf
    found["an infinite scale beside some that BF16 lacks"] = Tensor(
        fp8((1, 32), "f32"), (4, 64), fp8_codes, endless
    )
    nan_code = fp8_codes.copy()
    nan_code[2, 40] = 0xFF
    found["fp8: code"] = Tensor(fp8((1, 32)), (4, 64), nan_code, scales)
    for name, bits in (("bf16", 0x7FC0), ("f32", 0x7F800001)):
        values = fine[name].codes.copy()
        values.view(np.uint16 if name == "bf16" else np.uint32)[2, 40] = bits
        found[name] = Tensor(fine[name].format, (4, 64), values)
    return found


@pytest.mark.parametrize("name", nan_cases())
def test_a_nan_has_no_canonical_form(name: str) -> None:
    tensor = nan_cases()[name]
    assert leaf(tensor) is None and leaf(tensor, 2, 3) is None
    assert leaf(tensor, 0, 2) is not None and leaf(tensor, 3, 4) is not None
