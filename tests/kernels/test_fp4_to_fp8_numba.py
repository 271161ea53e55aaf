"""FP4 -> FP8 panels against ml_dtypes and float64: every scale byte x every gap x every code."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e4m3
from dsv4_quant.kernels import fp4_to_fp8_numba as kernel

FP4_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
FP4_VALUES[8] = 0.0  # the published table has no -0
FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


class Cast:
    """One panel through both entry points."""

    def __init__(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        block: tuple[int, int],
        group: int = 32,
    ) -> None:
        rows, cols = codes.shape
        tiles = -(-rows // block[0]), -(-cols // block[1])
        self.scales = np.full(tiles, 77, np.uint8)
        self.codes = np.full((rows, cols), 0xAA, np.uint8)
        self.spreads, self.result = np.zeros(256, np.int64), np.full(5, -1)
        kernel.fp8_scales(scales, group, *block, self.scales)
        self.status = kernel.fp4_to_fp8(
            e2m1.pack(codes), scales, self.scales, group, *block,
            self.codes, self.spreads, self.result,
        )  # fmt: skip


def judge(codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> tuple[int, int, int]:
    """(reason, smallest scale of a non-zero block, largest scale) of a tile, by the definition."""
    group = codes.shape[1] // scales.shape[1]
    live = (FP4_VALUES[codes] != 0).reshape(*scales.shape, group).any(-1)
    low, top = int(scales[live].min(initial=255)), int(scales.max())
    if top == 255:
        return kernel.NAN_SCALE, low, top
    if top < 6 and live.any():
        return kernel.UNDERFLOW, low, top
    scaled = FP4_VALUES[codes] * 2.0 ** (scales.repeat(group, 1).astype(int) - (top - 6))
    exact = (np.isin(scaled, FP8_VALUES)).all()
    return kernel.EXACT if exact else kernel.SPREAD, low, top


def test_every_scale_gap_and_code() -> None:
    """One row and tile per case: the largest scale in the first block, the code in the second."""
    top, gap, code = (a.ravel() for a in np.mgrid[0:255, 0:255, 0:16])
    top, gap, code = (a[gap <= top] for a in (top, gap, code))
    codes = np.zeros((top.size, 64), np.uint8)
    codes[:, 32:] = code[:, None]
    cast = Cast(codes, np.stack([top, top - gap], 1).astype(np.uint8), (1, 64))
    scale = np.maximum(top - 6, 0)
    assert np.array_equal(cast.scales[:, 0], scale)
    values = np.ldexp(FP4_VALUES[code], top - gap - scale)
    expected = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(expected, e4m3.encode(values.astype(np.float32)))  # the two oracles agree
    assert not cast.codes[:, :32].any()
    assert np.array_equal(cast.codes[:, 32:], expected[:, None].repeat(32, 1))
    assert cast.spreads[0] == top.size  # a single scale among the blocks that are not zero


@pytest.mark.parametrize("top", [0, 1, 5, 6, 7, 12, 20, 21, 25, 127, 253, 254])
def test_every_verdict(top: int) -> None:
    """Each code is judged on its own: 6 survives a gap of 16 and 4 one of 17, 0.5 neither."""
    for gap in range(top + 1):
        for code in range(16):
            codes = np.zeros((1, 64), np.uint8)
            codes[0, 63] = code
            scales = np.array([[top, top - gap]], np.uint8)
            cast = Cast(codes, scales, (1, 64))
            reason, low, largest = judge(codes, scales)
            assert cast.status == reason, (top, gap, code)
            if reason != kernel.EXACT:
                assert cast.result.tolist() == [0, 0, reason, low, largest]


def test_the_bounds() -> None:
    """The largest gap that each magnitude survives, and that no gap is too large for zeros."""
    last = {}
    for code in range(1, 8):
        gaps = [g for g in range(30) if _one_gap(code, g) == kernel.EXACT]
        assert gaps == list(range(len(gaps)))
        last[FP4_VALUES[code]] = gaps[-1]
    assert last == {0.5: 14, 1.0: 15, 1.5: 14, 2.0: 16, 3.0: 15, 4.0: 17, 6.0: 16}
    assert _one_gap(0, 100) == _one_gap(8, 100) == kernel.EXACT


def _one_gap(code: int, gap: int) -> int:
    codes = np.array([[7] * 32 + [code] * 32], np.uint8)
    return Cast(codes, np.array([[120, 120 - gap]], np.uint8), (1, 64)).status


@pytest.mark.parametrize("byte", [0, 5, 6, 100, 254, 255])
def test_a_nan_scale_spoils_its_tile_only(byte: int) -> None:
    """Whatever the other scales of the tile are, and also where it belongs to zeros."""
    codes = np.full((2, 128), 2, np.uint8)
    codes[0, :32], codes[1, 32:64] = 0, 0
    scales = np.full((2, 4), 120, np.uint8)
    scales[0, 0], scales[1, 1] = byte, 255
    cast = Cast(codes, scales, (2, 64))
    assert cast.scales.tolist() == [[255, 114]]
    assert cast.result.tolist() == [0, 0, kernel.NAN_SCALE, 120, 255]
    assert np.isnan(FP8_VALUES[cast.codes[:, :64]]).all()
    assert (FP8_VALUES[cast.codes[:, 64:]] == 64).all()


def test_scales_that_are_not_the_rule_s() -> None:
    """Nobody should pass any, but a code that saturates is reported all the same."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 4))
    scales = np.full((256, 2), 100, np.uint8)
    out_scales = np.arange(256, dtype=np.uint8)[:, None]
    out, result = np.empty((256, 64), np.uint8), np.zeros(5, np.int64)
    counts = np.zeros(256, np.int64)
    for row in range(255):
        one = slice(row, row + 1)
        status = kernel.fp4_to_fp8(
            e2m1.pack(codes[one]), scales[one], out_scales[one], 32, 1, 64, out[one], counts, result
        )
        values = np.ldexp(FP4_VALUES[codes[row]], 100 - row)
        assert np.array_equal(out[row], e4m3.encode(values.astype(np.float32)))
        exact = np.isin(values, FP8_VALUES).all()
        assert status == (kernel.EXACT if exact else kernel.SPREAD)
        assert exact == (94 <= row <= 108)


def test_first_inexact_tile_in_row_major_order() -> None:
    codes = np.full((5, 256), 1, np.uint8)
    scales = np.full((5, 8), 100, np.uint8)
    assert Cast(codes, scales, (2, 64)).status == kernel.EXACT
    scales[4, 0] = 3  # the last tile row, which has one row
    assert Cast(codes, scales, (2, 64)).result.tolist() == [2, 0, kernel.SPREAD, 3, 100]
    scales[3, 5] = 85
    assert Cast(codes, scales, (2, 64)).result.tolist() == [1, 2, kernel.SPREAD, 85, 100]
    scales[2, 3] = 255
    assert Cast(codes, scales, (2, 64)).result.tolist() == [1, 1, kernel.NAN_SCALE, 100, 255]
    codes[4], scales[4], scales[3, 5], scales[2, 3] = 0, 7, 86, 114  # all of it exact again
    cast = Cast(codes, scales, (2, 64))
    assert cast.status == kernel.EXACT and (cast.result == -1).all()
    assert np.flatnonzero(cast.spreads).tolist() == [0, 14]


@st.composite
def panels(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[int, int], int]:
    group = draw(st.sampled_from([32, 64, 128]))
    block = draw(st.sampled_from([1, 3, 32, 128])), group * draw(st.integers(1, 4))
    rows, groups = draw(st.integers(1, 140)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 16, (rows, groups * group), np.uint8)
    codes[:, :group] *= rng.random((rows, 1)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    middle, spread = draw(st.integers(0, 254)), draw(st.sampled_from([0, 3, 11, 14, 15, 30]))
    scales = rng.integers(middle - spread, middle + 1, (rows, groups)).clip(0, 254).astype(np.uint8)
    if draw(st.integers(0, 9)) == 0:
        scales[rng.integers(rows), rng.integers(groups)] = 255
    return codes, scales, block, group


@settings(max_examples=60, deadline=None)
@given(panels())
def test_any_geometry(
    panel: tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[int, int], int],
) -> None:
    codes, scales, block, group = panel
    cast = Cast(codes, scales, block, group)
    spreads, first = np.zeros(256, np.int64), None
    for i, j in np.ndindex(cast.scales.shape):
        rows = slice(i * block[0], (i + 1) * block[0])
        tile = codes[rows, j * block[1] : (j + 1) * block[1]]
        tile_scales = scales[rows, j * block[1] // group : (j + 1) * block[1] // group]
        live = (FP4_VALUES[tile] != 0).reshape(*tile_scales.shape, group).any(-1)
        spreads[np.ptp(tile_scales[live].astype(int)) if live.any() else 0] += 1
        reason, low, top = judge(tile, tile_scales)
        if reason != kernel.EXACT and first is None:
            first = [i, j, reason, low, top]
        found = cast.codes[rows, j * block[1] : (j + 1) * block[1]]
        if top == 255:
            assert cast.scales[i, j] == 255 and np.isnan(FP8_VALUES[found]).all()
            continue
        scale = max(top - 6, 0)
        assert cast.scales[i, j] == scale
        values = np.ldexp(FP4_VALUES[tile], tile_scales.repeat(group, 1).astype(int) - scale)
        assert np.array_equal(found, values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    assert np.array_equal(cast.spreads, spreads)
    assert (cast.status, cast.result.tolist()) == (
        (first[2], first) if first else (kernel.EXACT, [-1] * 5)
    )


@settings(max_examples=20, deadline=None)
@given(panels(), st.integers(1, 4))
def test_panels_of_whole_tiles_make_up_the_tensor(
    panel: tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[int, int], int], strips: int
) -> None:
    codes, scales, block, group = panel
    whole = Cast(codes, scales, block, group)
    step = strips * block[0]
    parts = [
        Cast(codes[r : r + step], scales[r : r + step], block, group)
        for r in range(0, codes.shape[0], step)
    ]
    assert np.array_equal(np.vstack([p.codes for p in parts]), whole.codes)
    assert np.array_equal(np.vstack([p.scales for p in parts]), whole.scales)
    assert np.array_equal(sum(p.spreads for p in parts), whole.spreads)


def test_threads_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    work = [
        (rng.integers(0, 16, (128, 512), np.uint8), rng.integers(90, 104, (128, 16), np.uint8))
        for _ in range(16)
    ]
    with ThreadPoolExecutor(2) as pool:
        threaded = list(pool.map(lambda w: Cast(*w, (128, 128)), work))
    for (codes, scales), found in zip(work, threaded, strict=True):
        alone = Cast(codes, scales, (128, 128))
        assert np.array_equal(found.codes, alone.codes)
        assert np.array_equal(found.spreads, alone.spreads)


def test_wrong_operands_are_refused() -> None:
    codes, scales = np.zeros((4, 64), np.uint8), np.zeros((4, 2), np.uint8)
    with pytest.raises(ValueError, match="do not fit tiles of 48 columns"):
        Cast(codes, scales, (4, 48))
    with pytest.raises(ValueError, match="groups of 16 columns"):
        Cast(codes, np.zeros((4, 4), np.uint8), (4, 64), 16)
    with pytest.raises(ValueError, match=r"scales must be a C-contiguous uint8 \[4, 2\]"):
        Cast(codes, np.zeros((2, 4), np.uint8).T, (4, 64))
    with pytest.raises(ValueError, match=r"out must be a C-contiguous uint8 \[1, 2\]"):
        Cast(codes, np.zeros((4, 4), np.uint8), (4, 64))
