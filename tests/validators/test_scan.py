"""What the fast loops count, against the same counted plainly with numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_quant.formats import bf16, e2m1, e4m3
from dsv4_quant.formats.blocks import BF16, F32, FP4, I64, Tensor, fp8
from dsv4_quant.validators.scan import scan
from dsv4_quant.validators.tally import Spot, Tally

QUARTER = {"fp4": 1.5, "fp8": 112.0}
LARGEST = {"fp4": 6.0, "fp8": 448.0}


def plainly(panel: Tensor) -> dict[str, int]:
    """Dead, saturated and slack blocks, by the sentences of the module's docstring."""
    assert panel.format.block is not None
    b, c = panel.format.block[0], min(panel.format.block[1], panel.shape[1])
    kind = panel.format.kind
    if kind == "fp4":
        values = e2m1.VALUES[e2m1.unpack(panel.codes)]
    else:
        values = np.nan_to_num(e4m3.VALUES[panel.codes], nan=480.0)
    found = {"dead": 0, "saturated": 0, "slack": 0}
    for row in range(0, values.shape[0], b):
        for column in range(0, values.shape[1], c):
            block = np.abs(values[row : row + b, column : column + c])
            found["dead"] += not block.any()
            found["saturated"] += 2 * np.count_nonzero(block >= LARGEST[kind]) >= b * c
            found["slack"] += bool(block.any()) and block.max() <= QUARTER[kind]
    return found


def counted(tally: Tally) -> dict[str, int]:
    return {"dead": tally.dead, "saturated": tally.saturated, "slack": tally.slack}


codes = st.sampled_from([range(1), range(4), range(256), range(0x76, 0x80)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), codes, st.integers(0, 2**32 - 1))
def test_fp4_blocks(rows: int, groups: int, of: range, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed = rng.choice(np.array(of, np.uint8), (rows, 16 * groups))
    packed[rng.random((rows, groups)).repeat(16, 1) < 0.3] = 0x88  # -0 is dead, too
    scales = rng.integers(0, 255, (rows, groups)).astype(np.uint8)
    panel = Tensor(FP4, (rows, 32 * groups), packed, scales)
    found = scan(panel, 0)
    assert counted(found) == plainly(panel)
    live = (e2m1.VALUES[e2m1.unpack(packed)] != 0).reshape(rows, groups, 32).any(axis=2)
    assert (found.exponents == np.bincount(scales[live], minlength=256)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 40), st.integers(1, 9), st.integers(1, 17), codes,
    st.sampled_from(["e8m0", "f32"]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_fp8_blocks_of_any_size(
    rows: int, cols: int, b: int, c: int, of: range, scale: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    held = rng.choice(np.array(of, np.uint8), (rows, cols))
    form = fp8((b, c), scale)  # type: ignore[arg-type]
    shape = form.scale_shape((rows, cols))
    exponents = rng.integers(1, 255, shape).astype(np.uint8)
    scales = exponents if scale == "e8m0" else (exponents.astype(np.uint32) << 23).view(np.float32)
    panel = Tensor(form, (rows, cols), held, scales)
    found = scan(panel, 0)
    assert counted(found) == plainly(panel)
    assert found.exponents.sum() == found.blocks - found.dead
    nans = np.count_nonzero(held & 0x7F == 0x7F)
    assert (found.bad.count if found.bad else 0) == nans


@pytest.mark.parametrize("code", range(256))
def test_every_fp8_code_is_seen_for_what_it_is(code: int) -> None:
    held = np.zeros((8, 16), np.uint8)
    held[5, 9] = code
    found = scan(Tensor(fp8((8, 16)), (8, 16), held, np.full((1, 1), 127, np.uint8)), 128)
    assert found.dead == (code in (0x00, 0x80))
    assert found.slack == (0 < abs(e4m3.VALUES[code]) <= 112)
    assert found.bad == (Spot(1, 133, 9, f"0x{code:02X}") if code & 0x7F == 0x7F else None)


@pytest.mark.parametrize("byte", range(256))
def test_every_e8m0_byte_is_a_scale_but_one(byte: int) -> None:
    scales = np.full((4, 2), 127, np.uint8)
    scales[2, 1] = byte
    found = scan(Tensor(FP4, (4, 64), np.full((4, 32), 0x77, np.uint8), scales), 8)
    assert found.bad_scales == (Spot(1, 10, 1, "0xFF") if byte == 0xFF else None)
    assert found.exponents[byte] == (8 if byte == 127 else 1)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, float("inf"), float("-inf"), float("nan")])
def test_f32_scales_that_are_none(value: float) -> None:
    scales = np.ones((2, 1), np.float32)
    scales[1, 0] = value
    found = scan(Tensor(fp8((8, 8), "f32"), (16, 8), np.ones((16, 8), np.uint8), scales), 16)
    assert found.bad_scales is not None
    assert (found.bad_scales.count, found.bad_scales.row, found.bad_scales.column) == (1, 3, 0)


def test_bf16_values() -> None:
    held = np.full((3, 5), 0x3F80, np.uint16)
    values = bf16.decode(np.arange(1 << 16, dtype=np.uint16))
    for bits in range(0, 1 << 16, 3):
        held[1, 2] = bits
        found = scan(Tensor(BF16, (3, 5), held), 4)
        assert (found.bad is not None) == (not np.isfinite(values[bits]))
        is_huge = np.isfinite(values[bits]) and abs(values[bits]) >= 65536
        assert (found.huge is not None) == is_huge
        spot = found.bad or found.huge
        assert spot is None or (spot.count, spot.row, spot.column) == (1, 5, 2)


@pytest.mark.parametrize("value", [65535.9, 65536.0, -65536.0, np.inf, np.nan, 3e38, 1e-45])
def test_f32_values(value: float) -> None:
    held = np.ones(7, np.float32)
    held[6] = value
    found = scan(Tensor(F32, (7,), held), 0)
    assert (found.bad is not None) == (not np.isfinite(value))
    assert (found.huge is not None) == (np.isfinite(value) and abs(np.float32(value)) >= 65536)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 300), st.integers(0, 100), st.sampled_from([BF16, F32]))
def test_stretches_of_zeros_are_measured_in_whole_words(length: int, at: int, form: object) -> None:
    dtype = np.uint16 if form == BF16 else np.float32
    held = np.ones(500, dtype)
    held[at : at + length] = 0
    per_word = 4 if form == BF16 else 2
    found = scan(Tensor(form, (500,), held), 0)  # type: ignore[arg-type]
    assert length - 2 * (per_word - 1) <= found.zero_run <= length
    assert found.zero_run % per_word == 0


def test_dead_blocks_in_a_row_are_counted_across_rows() -> None:
    packed = np.full((4, 32), 0x22, np.uint8)
    packed[1, 16:] = 0
    packed[2, :] = 0x80
    found = scan(Tensor(FP4, (4, 64), packed, np.full((4, 2), 100, np.uint8)), 0)
    assert (found.dead, found.zero_run) == (3, 96)


def test_ids_are_no_numbers_to_judge() -> None:
    found = scan(Tensor(I64, (2, 2), np.array([[0, -1], [1 << 40, 3]])), 0)
    assert (found.values, found.bad, found.huge) == (4, None, None)


def test_tallies_add_up() -> None:
    one, other = Tally(values=3, dead=1, zero_run=7), Tally(values=4, dead=2, zero_run=5)
    one.bad, other.bad = Spot(2, 9, 1, "later"), Spot(1, 4, 7, "earlier")
    one.add(other)
    assert (one.values, one.dead, one.zero_run) == (7, 3, 7)
    assert one.bad == Spot(3, 4, 7, "earlier")
