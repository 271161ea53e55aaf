"""Sums, names and rankings of weights that were cast."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from dsv4_quant.formats import e2m1, e4m3
from dsv4_quant.formats.blocks import BF16, FP4
from dsv4_quant.formats.cost import Cost, total
from dsv4_quant.reports.recast import (
    NORMAL,
    Recast,
    apart,
    by_layer,
    by_role,
    casts,
    model,
    recasts,
    sizes,
    sums,
    worst,
)
from tests.reports.synthetic import FP8, catalogue, tiny

ROWS = tiny()


def with_sqnr(row: Recast, sqnr: float) -> Recast:
    squares = 0.0 if sqnr == math.inf else 10 ** (-sqnr / 10)
    value = math.nan if math.isnan(sqnr) else 1.0
    return Recast(row.spec, row.before, Cost(1, value, squares, 0.1, 0, 0, 1, 0))


def test_layers_are_in_the_models_order_and_named_as_on_disk() -> None:
    mixed = random.Random(1).sample(ROWS, len(ROWS))
    groups = by_layer(mixed)
    assert list(groups) == [*(f"layers.{i}" for i in range(6)), "mtp.0"]
    for layer, held in groups.items():
        assert all(row.name.startswith(layer + ".") for row in held)
    assert sum(map(len, groups.values())) == len(ROWS)


def test_sums_are_those_of_the_parts() -> None:
    for groups in (by_layer(ROWS), by_role(ROWS), casts(ROWS)):
        assert total(sums(groups).values()).exponents == model(ROWS).exponents
        for name in ("values", "saturated", "flushed", "blocks", "exact_blocks", "largest_error"):
            combined = total(sums(groups).values())
            assert getattr(combined, name) == getattr(model(ROWS), name)
        for key, held in groups.items():
            assert sums(groups)[key] == total(row.cost for row in held)


def test_roles_tell_matrices_and_mtp_experts_apart() -> None:
    roles = by_role(ROWS)
    assert list(roles) == sorted(roles)
    assert {len(roles[f"experts w{i}"]) for i in (1, 2, 3)} == {48}
    assert {len(roles[f"mtp experts w{i}"]) for i in (1, 2, 3)} == {8}
    assert {row.within for row in roles["mtp"]} >= {"e_proj", "attn.wq_a"}


def test_worst_is_by_sqnr_then_name_and_exact_last_and_nan_first() -> None:
    values = [20.0, math.inf, 12.5, math.nan, 20.0, 3.0, -2.0]
    rows = [with_sqnr(row, sqnr) for row, sqnr in zip(ROWS, values, strict=False)]
    expected = [math.nan, -2.0, 3.0, 12.5, 20.0, 20.0, math.inf]
    for seed in range(5):
        mixed = random.Random(seed).sample(rows, len(rows))
        found = worst(mixed, 10)
        assert [row.cost.sqnr for row in found] == pytest.approx(expected, nan_ok=True)
        assert found[4].name < found[5].name
        assert worst(mixed, 2) == found[:2]


def test_apart_is_3_db_below_the_median_of_the_kind() -> None:
    rows = [row for row in ROWS if row.role == "experts w1"][:9]
    usual = [with_sqnr(row, 19 + i / 10) for i, row in enumerate(rows[:6])]
    rest = [with_sqnr(row, sqnr) for row, sqnr in zip(rows[6:], (15.9, 16.3, 4.0), strict=True)]
    found = apart(usual + rest)
    assert [one.row for one in found] == [rest[2], rest[0]]
    assert found[0].typical == pytest.approx(19.1)
    assert apart(usual) == []


def test_exact_weights_do_not_make_inexact_ones_stand_apart() -> None:
    rows = [row for row in ROWS if row.role == "experts w1"][:5]
    assert apart([*(with_sqnr(row, math.inf) for row in rows[1:]), with_sqnr(rows[0], 18)]) == []
    broken = with_sqnr(rows[1], math.nan)
    assert [one.row for one in apart([with_sqnr(rows[0], 18), broken])] == [broken]


def test_sizes_are_those_of_the_files() -> None:
    row = next(row for row in ROWS if row.spec.expert is not None)
    r, c = row.spec.shape
    fp8, fp4 = r * c + (r // 128) * (c // 128), r * c // 2 + r * c // 32
    assert sizes([row]) == (fp8, fp4)
    bf16 = Recast(row.spec, BF16, row.cost)
    assert sizes([row, bf16]) == (fp8 + 2 * r * c, 2 * fp4)


def test_recasts_take_the_formats_of_both_sides() -> None:
    found = catalogue(2, 4)
    name = "layers.1.ffn.experts.3.w2.weight"
    before = found.specs[name]._replace(format=FP8)
    (row,) = recasts({**found.specs, name: before}, found.specs, {name: Cost(values=7)})
    assert (row.name, row.before, row.after, row.cost.values) == (name, FP8, FP4, 7)


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    right = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    low, high = grid[right - 1], grid[right]
    return np.where(values - low < high - values, low, high)


@pytest.mark.parametrize(
    ("kind", "values", "grid", "block", "tries"),
    [("fp4", NORMAL["fp4"], e2m1.VALUES, 32, 2), ("fp8", NORMAL["fp8"], e4m3.VALUES, 4096, 1)],
)
def test_what_normal_values_give(
    kind: str, values: float, grid: np.ndarray, block: int, tries: int
) -> None:
    points = np.unique(grid[np.isfinite(grid)].astype(np.float64))
    given = np.random.default_rng(0).standard_normal((2**18 // block, block))
    largest = np.abs(given).max(axis=1, keepdims=True)
    exponents = np.ceil(np.log2(largest / points[-1]))
    errors = []
    for k in range(tries):
        scale = 2.0 ** (exponents - k)
        rounded = nearest(np.clip(given / scale, points[0], points[-1]), points) * scale
        errors.append(((given - rounded) ** 2).sum(axis=1))
    noise = np.min(errors, axis=0).sum()
    assert 10 * math.log10((given**2).sum() / noise) == pytest.approx(values, abs=0.1), kind


def test_what_normal_values_give_in_bf16() -> None:
    given = np.random.default_rng(0).standard_normal(2**18)
    scale = 2.0 ** (np.floor(np.log2(np.abs(given))) - 7)
    noise = ((given - np.rint(given / scale) * scale) ** 2).sum()
    assert 10 * math.log10((given**2).sum() / noise) == pytest.approx(NORMAL["bf16"], abs=0.1)
