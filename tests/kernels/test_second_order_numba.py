"""Second-order rounding: against the textbook's form, on every code, and where it must do nothing.

The oracle inverts a C x C matrix and takes its Cholesky factor, as GPTQ's paper writes it down.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.kernels.jit_numba import NAN
from dsv4_quant.kernels.second_order_factor_numba import (
    BLOCK,
    MOST_SHRINKAGE,
    Factor,
    factor,
    shrinkage_of,
)
from dsv4_quant.kernels.second_order_numba import round_fp4, round_fp8

Array = NDArray[np.float32]

GROUP, TILE = 32, (16, 48)


def correlated(n: int, cols: int, seed: int = 0) -> Array:
    """Inputs whose i-th principal direction has variance 1 / i, and one channel that is large."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(99).standard_normal((cols, cols)))[0]
    x = rng.standard_normal((n, cols)) * np.arange(1, cols + 1) ** -0.5 @ directions.T
    x[:, 5] *= 10
    return x.astype(np.float32)


def weights(rows: int, cols: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def spread(scales: NDArray[np.uint8], block: tuple[int, int], shape: tuple[int, int]) -> Array:
    powers = np.repeat(np.repeat(e8m0.VALUES[scales], block[0], 0), block[1], 1)
    return powers[: shape[0], : shape[1]]


class Rounded:
    """One weight under scales that let the largest values saturate."""

    def __init__(self, kind: str, w: Array, made: Factor, scales: NDArray[np.uint8] | None = None):
        rows, cols = w.shape
        block = (1, GROUP) if kind == "fp4" else TILE
        shape = (-(-rows // block[0]), -(-cols // block[1]))
        rng = np.random.default_rng(3)
        byte = 126 if kind == "fp4" else 119
        self.scales = (
            rng.integers(byte - 1, byte + 1, shape, np.uint8) if scales is None else scales
        )
        self.steps = spread(self.scales, block, w.shape)
        self.codes = np.full((rows, cols // 2 if kind == "fp4" else cols), 0xAA, np.uint8)
        if kind == "fp4":
            self.status = round_fp4(w, self.scales, GROUP, made, self.codes)
            self.grid = e2m1.VALUES[e2m1.unpack(self.codes)]
        else:
            self.status = round_fp8(w, self.scales, TILE, made, self.codes)
            self.grid = e4m3.VALUES[self.codes]
        self.values = self.grid * self.steps


ENCODE = {"fp4": e2m1.encode, "fp8": e4m3.encode}
VALUES = {"fp4": e2m1.VALUES, "fp8": e4m3.VALUES}


def textbook(kind: str, w: Array, steps: Array, x: Array, made: Factor) -> Array:
    """GPTQ column by column: ``inv(H) = U'U``, and an error is spread as ``U[j, j:] / U[j, j]``."""
    h = x.astype(np.float64).T @ x
    h = (1 - made.shrinkage) * h + made.shrinkage * np.diag(np.diag(h))
    h = h[np.ix_(made.order, made.order)]
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    left, steps = w.astype(np.float64)[:, made.order], steps[:, made.order]
    done = np.empty_like(left)
    for j in range(w.shape[1]):
        codes = ENCODE[kind]((left[:, j] / steps[:, j]).astype(np.float32))
        done[:, j] = VALUES[kind][codes] * steps[:, j]
        left[:, j:] -= np.outer((left[:, j] - done[:, j]) / u[j, j], u[j, j:])
    out = np.empty_like(done)
    out[:, made.order] = done
    return out.astype(np.float32)


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
@pytest.mark.parametrize(
    ("n", "rows", "cols"),
    [(2, 3, 32), (7, 70, 96), (50, 130, 192), (96, 20, 96), (300, 33, 160)],
)
def test_it_is_the_textbooks_method(kind: str, n: int, rows: int, cols: int) -> None:
    """Fewer inputs than columns, as many, and more; whole blocks and ragged ones."""
    x, w = correlated(n, cols), weights(rows, cols)
    made = factor(x, shrinkage=0.05)
    assert made is not None and made.inputs.shape == (min(n, cols), cols)
    found = Rounded(kind, w, made)
    assert found.status == 0
    np.testing.assert_array_equal(found.values, textbook(kind, w, found.steps, x, made))


def still(cols: int) -> Factor:
    """A factor under which nothing moves."""
    none = np.zeros((1, cols), np.float32)
    return Factor(np.arange(cols), none, none.T.copy(), np.zeros((cols, BLOCK), np.float32), 0.5)


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_where_nothing_moves_values_go_to_the_nearest_code(kind: str) -> None:
    """Every midpoint, its neighbours, every code, and beyond the largest; under several scales."""
    grid = VALUES[kind][np.isfinite(VALUES[kind])].astype(np.float64)
    grid = np.unique(grid)
    middle = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    wild = np.array([2 * grid[-1], -1e9, 1e-30, -1e-30, 0.0, -0.0])
    some = [middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), grid, wild]
    values = np.concatenate(some).astype(np.float32)
    values = np.pad(values, (0, -len(values) % 96))
    for byte in (40, 126, 127, 200):
        scales = np.full((1, len(values) // (GROUP if kind == "fp4" else TILE[1])), byte, np.uint8)
        w = (values * e8m0.VALUES[byte])[None]
        found = Rounded(kind, w, still(w.shape[1]), scales)
        codes = ENCODE[kind](values)
        if kind == "fp4":
            codes = np.where(codes == 8, 0, codes).astype(np.uint8)
            np.testing.assert_array_equal(e2m1.unpack(found.codes)[0], codes)
        else:
            np.testing.assert_array_equal(found.codes[0], codes)


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_every_code_under_every_scale_comes_back(kind: str) -> None:
    codes = np.arange(16 if kind == "fp4" else 256, dtype=np.uint8)
    codes = codes[np.isfinite(VALUES[kind][codes])]
    width = GROUP if kind == "fp4" else TILE[1]
    cols = np.resize(codes, 96 if kind == "fp4" else 288)
    made = factor(correlated(20, len(cols)))
    assert made is not None
    for byte in range(255):
        with np.errstate(over="ignore"):
            w = (VALUES[kind][cols] * e8m0.VALUES[byte])[None]
        held = np.where(np.isfinite(w[0]), cols, 0)
        w = np.where(np.isfinite(w), w, 0).astype(np.float32)
        found = Rounded(kind, w, made, np.full((1, len(cols) // width), byte, np.uint8))
        assert found.status == 0
        if kind == "fp4":
            assert found.codes.tobytes() == e2m1.pack(np.where(held == 8, 0, held)).tobytes()
        else:
            assert found.codes.tobytes() == held.astype(np.uint8).tobytes()


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_rows_do_not_know_each_other(kind: str) -> None:
    """Panels of any size, on any thread, are the rows of the whole."""
    w, made = weights(208, 96), factor(correlated(30, 96))
    assert made is not None
    whole = Rounded(kind, w, made)
    b = 1 if kind == "fp4" else TILE[0]

    def panel(rows: slice) -> NDArray[np.uint8]:
        scales = np.ascontiguousarray(whole.scales[rows.start // b : -(-rows.stop // b)])
        return Rounded(kind, w[rows], made, scales).codes

    cuts = [0, 16, 112, 144, 208]
    with ThreadPoolExecutor(4) as pool:
        panels = pool.map(panel, [slice(*pair) for pair in pairwise(cuts)])
        assert np.concatenate(list(panels)).tobytes() == whole.codes.tobytes()


def test_a_factor_has_the_same_bits_on_any_thread() -> None:
    x = correlated(70, 128)
    with ThreadPoolExecutor(4) as pool:
        made = [one for one in pool.map(factor, [x] * 4) if one is not None]
    assert len(made) == 4
    for one in made[1:]:
        assert [p.tobytes() for p in one[:4]] == [p.tobytes() for p in made[0][:4]]


def test_one_column_makes_up_for_its_twin() -> None:
    """8 saturates at 6; the other column, which is always given the same, takes the missing 2."""
    x = np.repeat(weights(40, 1), 2, axis=1)
    x = np.concatenate([x, np.zeros((40, 30), np.float32)], axis=1)
    made = factor(x, shrinkage=0.01)
    assert made is not None
    w = np.zeros((1, 32), np.float32)
    w[0, 0] = 8
    assert Rounded("fp4", w, made, np.array([[127]], np.uint8)).values[0, :3].tolist() == [6, 2, 0]


def test_columns_that_are_never_used_are_rounded_plainly() -> None:
    x, w = correlated(20, 96), weights(9, 96)
    dead = np.arange(96) % 3 == 1
    x[:, dead] = 0
    made = factor(x)
    assert made is not None
    found = Rounded("fp4", w, made)
    plain = e2m1.encode(w / found.steps)
    np.testing.assert_array_equal(found.grid[:, dead], e2m1.VALUES[plain][:, dead])
    assert (found.grid != e2m1.VALUES[plain])[:, ~dead].any()


def test_the_size_of_the_inputs_does_not_matter() -> None:
    w = weights(9, 96)
    codes = set()
    for power in (-100, 0, 100):
        made = factor(np.ldexp(correlated(20, 96), power))
        assert made is not None
        codes.add(Rounded("fp4", w, made).codes.tobytes())
    assert len(codes) == 1


def test_unseen_inputs_gain() -> None:
    """With a quarter as many inputs as columns, where GPTQ's own 1 % of damping loses."""
    w, unseen = weights(64, 256), correlated(2000, 256, seed=8)

    def error(shrinkage: float | None) -> float:
        made = factor(correlated(64, 256), shrinkage=shrinkage)
        assert made is not None
        made = made if shrinkage != 0 else still(256)
        return float(np.square(unseen @ (w - Rounded("fp4", w, made).values).T).sum())

    plain = Rounded("fp4", w, still(256))
    least = float(np.square(unseen @ (w - plain.values).T).sum())
    assert error(None) < 0.85 * least
    assert error(0.01) > error(None)


def test_white_inputs_move_nothing() -> None:
    """However many there are, also if every one of them comes eight times, or one always."""
    for n in (0, 1, 2, 40, 400):
        assert factor(weights(n, 96)) is None
    again, tokens = np.tile(weights(40, 96), (8, 1)), np.tile(np.arange(40), 8)
    believed = factor(again)
    assert believed is not None, "by chance they look correlated"
    assert factor(again, tokens) is None
    assert factor(correlated(40, 96), np.full(40, 7)) is None


def test_shrinkage_is_the_published_estimate() -> None:
    """Groups of one input: Schaefer & Strimmer's formula, written out."""
    x = correlated(25, 12).astype(np.float64)
    z = x / np.sqrt(np.square(x).sum(0))
    products = z[:, :, None] * z[:, None, :]  # [n, C, C]
    apart = ~np.eye(12, dtype=bool)
    variance = 25 * products.var(0, ddof=1)
    expected = variance[apart].sum() / np.square(products.sum(0))[apart].sum()
    assert 0.01 < expected < MOST_SHRINKAGE
    assert shrinkage_of(z) == pytest.approx(expected, rel=1e-12)


def test_shrinkage_falls_as_inputs_are_added() -> None:
    found = [factor(correlated(n, 64)) for n in (20, 100, 1000)]
    values = [one.shrinkage for one in found if one is not None]
    assert len(values) == 3 and values == sorted(values, reverse=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_said(bad: float) -> None:
    x, w, made = correlated(20, 96), weights(9, 96), factor(correlated(20, 96))
    assert made is not None
    w[4, 7] = bad
    for kind in ("fp4", "fp8"):
        found = Rounded(kind, w, made)
        assert found.status == NAN and (found.codes == 0xAA).all()
    x[3, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        factor(x)


def test_a_scale_that_is_none_is_said() -> None:
    made = factor(correlated(20, 96))
    assert made is not None
    scales = np.full((9, 3), 127, np.uint8)
    scales[8, 2] = e8m0.NAN
    assert Rounded("fp4", weights(9, 96), made, scales).status == NAN


def test_a_weight_at_the_end_of_float32() -> None:
    """Its grid point overflows; the others are rounded as if it had no error."""
    w, made = weights(1, 96), factor(correlated(20, 96))
    assert made is not None
    w[0, 40] = np.finfo(np.float32).max
    scales = np.array([[126, 254 - 1, 126]], np.uint8)
    found = Rounded("fp4", w, made, scales)
    assert found.status == 0 and np.isfinite(found.values[0, :32]).all()


def test_wrong_shapes_are_refused() -> None:
    made, out = factor(correlated(20, 96)), np.empty((4, 48), np.uint8)
    assert made is not None
    for w, scales in [
        (weights(4, 64), np.full((4, 2), 127, np.uint8)),
        (weights(4, 96), np.full((4, 2), 127, np.uint8)),
        (weights(4, 192)[:, ::2], np.full((4, 3), 127, np.uint8)),
    ]:
        with pytest.raises(ValueError, match=r"must be|cannot"):
            round_fp4(w, scales, GROUP, made, out)
