"""The CPU twins of quantise_fp4 and quantise_fp8 against their definition: codes, scales, figures.

Everything is compared as bytes, the float64 sums too.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsv4_quant.formats import bf16, e2m1, e4m3
from dsv4_quant.formats.cost import Cost
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels import quantise_fp4_torch, quantise_fp8_torch
from dsv4_quant.kernels.figures import Figures, cost
from dsv4_quant.kernels.jit_numba import NAN
from dsv4_quant.kernels.quantise_fp4_numba import quantise_fp4
from dsv4_quant.kernels.quantise_fp8_numba import quantise_fp8
from dsv4_quant.kernels.quantised_torch import statistics

EVERY = np.arange(65536, dtype=np.uint16)
FINITE = EVERY[(EVERY & 0x7F80) != 0x7F80]
TABLES = {"fp4": e2m1.VALUES[:8], "fp8": e4m3.VALUES[:127]}
kinds = pytest.mark.parametrize("kind", TABLES)
rules = pytest.mark.parametrize("rule", ScaleRule, ids=lambda rule: rule.value)
inputs = pytest.mark.parametrize("dtype", [np.uint16, np.float32], ids=["bf16", "f32"])

Values = NDArray[Any]
Block = tuple[int, int]


@dataclass
class Cast:
    """A weight cast in panels of some rows of blocks each."""

    values: Values
    kind: str
    rule: ScaleRule | None
    block: Block
    panel: int = 1 << 20

    def __post_init__(self) -> None:
        (rows, cols), (b, c) = self.values.shape, self.block
        self.scales = np.full((-(-rows // b), -(-cols // c)), 0xAA, np.uint8)
        self.codes = np.full((rows, cols // 2 if self.kind == "fp4" else cols), 0xAA, np.uint8)
        self.result = np.full(3, -1)

    def run(self, *, codes: bool = True, figures: bool = True) -> int:
        """All panels; 0, or the status of the first that is refused."""
        self.figures: list[Figures] = []
        for first in range(0, len(self.scales), self.panel):
            scales = self.scales[first : first + self.panel]
            rows = slice(first * self.block[0], (first + self.panel) * self.block[0])
            held = Figures.empty(len(scales))
            held.value_squares[:] = held.counts[:] = held.scales[:] = 7  # of a panel before
            self.figures.append(held)
            status = self.cast(
                self.values[rows], scales, self.codes[rows] if codes else None,
                held if figures else None,
            )  # fmt: skip
            if status:
                return status
        return 0

    def cast(
        self, values: Values, scales: Values, codes: Values | None, figures: Figures | None
    ) -> int:
        b, c = self.block
        if self.kind == "fp4":
            return quantise_fp4(values, self.rule, c, scales, codes, figures, self.result)
        return quantise_fp8(values, self.rule, b, c, scales, codes, figures, self.result)

    def cost(self) -> Cost:
        return cost(self.figures)


def defined(
    values: Values, kind: str, rule: ScaleRule, block: Block
) -> tuple[Values, Values, Cost]:
    """Codes, scales and cost as the definition has them."""
    x = torch.from_numpy(bf16.decode(values) if values.dtype == np.uint16 else values)
    if kind == "fp4":
        made = quantise_fp4_torch.quantise_fp4(x, rule, block[1])
    else:
        made = quantise_fp8_torch.quantise_fp8(x, rule, block)
    (found,) = statistics(made, x.numel())
    return made.codes.numpy(), made.scales.numpy(), found


def check(values: Values, kind: str, rule: ScaleRule, block: Block, panel: int = 1 << 20) -> Cast:
    codes, scales, expected = defined(values, kind, rule, block)
    made = Cast(values, kind, rule, block, panel)
    assert made.run() == 0
    np.testing.assert_array_equal(made.scales, scales)
    np.testing.assert_array_equal(made.codes, codes)
    assert made.cost() == expected  # floats included: == is bit for bit, but for zeros
    assert made.result.tolist() == [-1, -1, -1]
    return made


def as_type(values: Values, dtype: type) -> Values:
    """float32 values, or the BF16 bits of these without their last 16 bits."""
    values = np.ascontiguousarray(values, np.float32)
    return values if dtype == np.float32 else (values.view(np.uint32) >> 16).astype(np.uint16)


def mixed(shape: Block, seed: int, exponent: int = 0) -> Values:
    """Log-normal: wide enough a range for every candidate to win somewhere."""
    draw = np.random.default_rng(seed)
    spread = np.exp(2 * draw.standard_normal(shape))
    return (draw.standard_normal(shape) * spread * 2.0**exponent).astype(np.float32)


@rules
@kinds
@pytest.mark.parametrize("order", ["mixed", "sorted"])
def test_every_bf16(kind: str, rule: ScaleRule, order: str) -> None:
    """All 65,280 numbers: shuffled, where most are small beside the largest of their block; and by
    magnitude, where they are alike, so that each is rounded under its own scale."""
    bits = np.random.default_rng(1).permutation(FINITE)
    if order == "sorted":
        bits = bits[np.argsort(bits & 0x7FFF, kind="stable")]
    made = check(bits.reshape(-1, 128), kind, rule, (1, 32))
    if order == "sorted":
        assert len(np.unique(made.scales)) > 240
    elif kind == "fp8":
        check(bits.reshape(-1, 128), kind, rule, (5, 12))


@rules
@kinds
@inputs
def test_every_code_every_midpoint_under_every_scale(
    kind: str, rule: ScaleRule, dtype: type
) -> None:
    table = TABLES[kind].astype(np.float64)
    points = np.concatenate([table, (table[1:] + table[:-1]) / 2])
    points = np.concatenate([points, -points])
    rows = np.tile(np.resize(points, -(-points.size // 31) * 31).reshape(-1, 31), (2, 1))
    rows = np.hstack([rows, np.full((len(rows), 1), table[-1])])  # fixes s_max
    rows[len(rows) // 2 :, -1] = points[:31].max()  # and here it need not
    exponents = range(-127, 127 if kind == "fp4" else 121)
    with np.errstate(over="ignore"):
        values = np.concatenate([rows * 2.0**s for s in exponents]).astype(np.float32)
    values[~np.isfinite(values)] = 0
    made = check(as_type(values, dtype), kind, rule, (1, 32))
    if rule is ScaleRule.MAX:
        assert len(np.unique(made.scales)) >= 2 * 127 - 10
        codes = e2m1.unpack(made.codes) if kind == "fp4" else made.codes
        assert len(np.unique(codes)) == (15 if kind == "fp4" else 254)


@kinds
@rules
@pytest.mark.parametrize("exponent", [-149, -133, -120, 0, 80])
def test_any_float32(kind: str, rule: ScaleRule, exponent: int) -> None:
    """Full mantissas, subnormals, the largest exponents; where S is large, quotients underflow."""
    values = mixed((40, 96), 2, exponent)
    values[::5, ::7] *= np.float32(2.0**-60)
    values[1::5, ::3] = np.float32(2.0**-149)
    values[2::5, ::3] = 0
    values[3::5] = -0.0
    check(values, kind, rule, (1, 32))
    top = np.finfo(np.float32).max
    values[::9, 5], values[4::9, 7] = top, -top
    check(values, kind, rule, (1, 32))


CASES = [
    ("fp4", (5, 70), (1, 32)),
    ("fp4", (7, 24), (1, 12)),
    ("fp4", (3, 128), (1, 64)),
    ("fp4", (2, 300), (1, 300)),
    ("fp4", (9, 6), (1, 2)),
    ("fp4", (3, 132 * 32), (1, 32)),
    ("fp8", (9, 20), (3, 5)),
    ("fp8", (10, 70), (4, 32)),
    ("fp8", (200, 300), (128, 128)),
    ("fp8", (33, 200), (128, 128)),
    ("fp8", (150, 70), (70, 100)),
    ("fp8", (1, 1), (2, 2)),
    ("fp8", (5, 7), (1, 1)),
]


@rules
@inputs
@pytest.mark.parametrize(("kind", "shape", "block"), CASES, ids=str)
def test_blocks_and_ragged_edges(
    kind: str, shape: Block, block: Block, dtype: type, rule: ScaleRule
) -> None:
    check(as_type(mixed(shape, 3), dtype), kind, rule, block)
    normal = np.random.default_rng(4).standard_normal(shape)
    check(as_type(normal, dtype), kind, rule, block)


@kinds
def test_least_squares_takes_another_scale_somewhere(kind: str) -> None:
    """Else nothing here would show that it does."""
    values = np.random.default_rng(5).standard_normal((64, 256)).astype(np.float32)
    block = (1, 32)
    if kind == "fp8":  # one value hardly too large for the smaller scale, others that it holds
        values = np.full((64, 256), 2.0**-10, np.float32)
        values[:, ::32] = np.linspace(224.5, 300, 512).reshape(64, 8)
    least, largest = (check(values, kind, rule, block) for rule in reversed(ScaleRule))
    lower = (least.scales < largest.scales).mean()
    assert 0.05 < lower < 0.95
    assert least.cost().error_squares < largest.cost().error_squares
    assert least.cost().saturated and not largest.cost().saturated


@kinds
def test_a_smaller_scale_must_win_by_a_margin(kind: str) -> None:
    """A tenth of a block's error apart down to nothing: every choice is the definition's."""
    draw = np.random.default_rng(6)
    values = np.zeros((512, 32), np.float32)
    values[:, 0] = 232 if kind == "fp8" else draw.choice([3.5, 5, 5.5], 512)
    near = 2.0**-11 if kind == "fp8" else 0.25
    values[:, 1:] = near * (1 + 2.0 ** -draw.integers(1, 24, (512, 31)))
    check(values, kind, ScaleRule.LEAST_SQUARES, (1, 32))


@st.composite
def weights(draw: st.DrawFn) -> tuple[Values, str, Block, int]:
    """On the grid of some scale, on midpoints, near them; outliers, zeros, whole blocks of them."""
    kind = draw(st.sampled_from(list(TABLES)))
    b = 1 if kind == "fp4" else draw(st.sampled_from([1, 2, 3, 8]))
    c = draw(st.sampled_from([2, 6, 32, 32, 64]))
    rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 8)) * draw(st.sampled_from([2, 32]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    table = TABLES[kind].astype(np.float64)
    points = np.concatenate([table, (table[1:] + table[:-1]) / 2])
    values = random.choice(points, (rows, cols)) * random.choice([-1, 1], (rows, cols))
    values *= 2.0 ** random.integers(-3, 1, (rows, cols))
    values *= 2.0 ** random.integers(*draw(st.sampled_from([(-130, -110), (-3, 3), (0, 100)])))
    values *= 1 + random.choice([0, 0, 0, 2.0**-7, -(2.0**-8), 2.0**-23], (rows, cols))
    for outlier in draw(st.lists(st.integers(-20, 20), max_size=3)):
        values[random.integers(rows), random.integers(cols)] *= 2.0**outlier
    values[random.random((rows, cols)) < draw(st.sampled_from([0, 0.3]))] = 0
    values[random.integers(rows)] *= draw(st.sampled_from([0, 1]))
    dtype = draw(st.sampled_from([np.uint16, np.float32]))
    return as_type(values, dtype), kind, (b, c), draw(st.integers(1, 4))


@settings(max_examples=120, deadline=None)
@given(weights(), st.sampled_from(ScaleRule))
def test_any_weight(weight: tuple[Values, str, Block, int], rule: ScaleRule) -> None:
    values, kind, block, panel = weight
    check(values, kind, rule, block, panel)


@rules
@kinds
def test_panels_and_threads_do_not_matter(kind: str, rule: ScaleRule) -> None:
    """The same Cost to the last bit, though float64 sums depend on their order."""
    block = (1, 32) if kind == "fp4" else (4, 32)
    values = as_type(mixed((52, 37 * 32), 7), np.uint16)
    whole = check(values, kind, rule, block)
    for panel in (1, 2, 5, 12):
        made = check(values, kind, rule, block, panel)
        assert made.cost() == whole.cost()
        assert made.cost().value_squares.hex() == whole.cost().value_squares.hex()
    with ThreadPoolExecutor(2) as pool:
        casts = [Cast(values, kind, rule, block, 3) for _ in range(4)]
        assert list(pool.map(Cast.run, casts)) == [0] * 4
    for made in casts:
        assert made.cost() == whole.cost() and made.codes.tobytes() == whole.codes.tobytes()


@rules
@kinds
@inputs
@pytest.mark.parametrize("block", [(1, 32), (1, 12)], ids=str)
def test_passes(kind: str, rule: ScaleRule, dtype: type, block: Block) -> None:
    """Scales alone, then codes under them, and either without figures: always the same bytes."""
    values = as_type(mixed((9, 192), 8), dtype)
    both = check(values, kind, rule, block)
    alone = Cast(values, kind, rule, block, 2)
    assert alone.run(codes=False, figures=False) == 0
    assert (alone.codes == 0xAA).all()
    np.testing.assert_array_equal(alone.scales, both.scales)
    alone.rule = None
    assert alone.run(figures=False) == 0
    np.testing.assert_array_equal(alone.codes, both.codes)
    assert alone.run() == 0 and alone.cost() == both.cost()
    figures = Cast(values, kind, rule, block, 2)
    assert figures.run(codes=False) == 0 and figures.cost() == both.cost()
    np.testing.assert_array_equal(figures.scales, both.scales)
    plain = Cast(values, kind, rule, block, 2)
    assert plain.run(figures=False) == 0
    np.testing.assert_array_equal(plain.codes, both.codes)


@inputs
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    ("kind", "block"), [("fp4", (1, 32)), ("fp4", (1, 12)), ("fp8", (1, 12)), ("fp8", (4, 32))]
)
def test_the_first_infinity_or_nan_is_named(
    kind: str, dtype: type, bad: float, block: Block
) -> None:
    values = np.linspace(-3, 5, 10 * 96).astype(np.float32).reshape(10, 96)
    values[5, 91] = values[5, 90] = values[7, 2] = values[9, 0] = bad  # in rows and in blocks
    values = as_type(values, dtype)
    for codes in (True, False):
        made = Cast(values, kind, ScaleRule.MAX, block)
        assert made.run(codes=codes) == NAN
        bits = values if dtype == np.uint16 else values.view(np.uint32)
        assert made.result.tolist() == [5, 90, bits[5, 90]]


@kinds
def test_empty(kind: str) -> None:
    for shape in ((0, 64), (3, 0)):
        made = Cast(np.zeros(shape, np.uint16), kind, ScaleRule.MAX, (1, 32))
        assert made.run() == 0
        assert made.cost() == Cost()


def test_wrong_operands_are_refused() -> None:
    values, result = np.zeros((4, 64), np.uint16), np.zeros(3, np.int64)
    scales, codes = np.zeros((4, 2), np.uint8), np.zeros((4, 32), np.uint8)
    rule = ScaleRule.MAX
    for width, group in ((63, 32), (64, 5)):
        with pytest.raises(ValueError, match="both must be even"):
            quantise_fp4(values[:, :width], rule, group, scales, codes, None, result)
    with pytest.raises(ValueError, match="at least one value"):
        quantise_fp8(values, rule, 1, 0, scales, None, None, result)
    with pytest.raises(ValueError, match="values must be a C-contiguous uint16"):
        quantise_fp4(values[:, ::2], rule, 32, scales[:, :1], None, None, result)
    with pytest.raises(ValueError, match="values must be a C-contiguous float32"):
        quantise_fp4(values.astype(np.float64), rule, 32, scales, codes, None, result)
    with pytest.raises(ValueError, match=r"scales must be a C-contiguous uint8 \[4, 2\]"):
        quantise_fp4(values, rule, 32, scales[:3], codes, None, result)
    with pytest.raises(ValueError, match=r"codes must be a C-contiguous uint8 \[4, 64\]"):
        quantise_fp8(values, rule, 1, 32, scales, codes, None, result)
    with pytest.raises(ValueError, match=r"value_squares must be a C-contiguous float64 \[4\]"):
        quantise_fp4(values, rule, 32, scales, codes, Figures.empty(3), result)
