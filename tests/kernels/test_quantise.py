"""quantise_fp4 and quantise_fp8 against a rule spelled out in numpy and ml_dtypes, bit for bit."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_quant.formats import e2m1, e4m3
from dsv4_quant.formats.blocks import FP4, Format, fp8
from dsv4_quant.formats.cost import Cost
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels import ops
from dsv4_quant.kernels.bf16_to_fp4_numba import bf16_to_fp4_exact
from dsv4_quant.kernels.bf16_to_fp8_numba import bf16_to_fp8_exact
from dsv4_quant.kernels.quantised_torch import statistics

BACKENDS = ("torch", "triton")
# name -> format's table, ml_dtypes' type, scale byte of a block of zeros, exponents that are tried
KINDS = {
    "fp4": (e2m1, ml_dtypes.float4_e2m1fn, 1, 4),
    "fp8": (e4m3, ml_dtypes.float8_e4m3fn, 105, 2),
}
backends = pytest.mark.parametrize("backend", BACKENDS)
kinds = pytest.mark.parametrize("kind", KINDS)
rules = pytest.mark.parametrize("rule", ScaleRule, ids=lambda rule: rule.value)
FIGURES = ("value_squares", "error_squares", "largest_errors", "saturated", "flushed")


def quantise(x, kind, rule, block, backend=None):
    """The operation; FP4's groups are blocks of one row."""
    if kind == "fp4":
        return ops.quantise_fp4(x, rule, block[1], backend=backend)
    return ops.quantise_fp8(x, rule, block, backend=backend)


def fold(values):
    """Sum by halves of a power of two of values."""
    values = np.pad(values, (0, (1 << (len(values) - 1).bit_length()) - len(values)))
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]


def oracle_block(values, kind, rule, size):
    """Codes, scale byte and figures of one block ``[r, c]``, laid out in ``size`` for the sums."""
    table, narrow, zero, candidates = KINDS[kind]
    whole = np.zeros(size)
    whole[: values.shape[0], : values.shape[1]] = values
    v = whole.ravel()
    amax = np.abs(v).max()
    s_max = next(s for s in range(-127, 128) if amax <= table.MAX * 2.0**s) if amax else zero - 127
    best = None
    for step in range(candidates if rule is ScaleRule.LEAST_SQUARES else 1):
        s = max(s_max - step, -127)
        scaled = np.clip(v / 2.0**s, -table.MAX, table.MAX)
        codes = scaled.astype(np.float32).astype(narrow)
        errors = v - codes.astype(np.float64) * 2.0**s
        total = fold(errors * errors)
        if best is None or total < best[0] * (1 - 2.0**-40):
            best = total, s, codes.view(np.uint8), errors
    total, s, codes, errors = best
    if kind == "fp4":
        codes = np.where(codes == 8, 0, codes)
    kept = codes.reshape(size)[: values.shape[0], : values.shape[1]]
    saturated = (np.abs(v) > table.MAX * 2.0**s).sum()
    flushed = ((v != 0) & (codes & 0x7F == 0)).sum()
    return kept, s + 127, (fold(v * v), total, np.abs(errors).max(), saturated, flushed)


def oracle(x, kind, rule, block):
    """Codes ``[R, C]``, scales ``[h, w]`` and figures ``[h, w, 5]`` of one matrix."""
    x = x.double().cpu().numpy()
    h, w = (-(-size // side) for size, side in zip(x.shape, block, strict=True))
    codes, scales = np.empty(x.shape, np.uint8), np.empty((h, w), np.uint8)
    figures = np.empty((h, w, 5))
    for i, j in np.ndindex(h, w):
        at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        codes[at], scales[i, j], figures[i, j] = oracle_block(x[at], kind, rule, block)
    return codes, scales, figures


def one_per_byte(codes, kind):
    codes = codes.cpu().numpy()
    return e2m1.unpack(codes) if kind == "fp4" else codes


def check(x, kind, rule, block, backend):
    """A matrix against the oracle; returns what the operation gave."""
    result = quantise(x, kind, rule, block, backend)
    codes, scales, figures = oracle(x, kind, rule, block)
    np.testing.assert_array_equal(result.scales.cpu().numpy(), scales)
    np.testing.assert_array_equal(one_per_byte(result.codes, kind), codes)
    for index, name in enumerate(FIGURES):
        found = getattr(result, name).cpu().numpy()
        np.testing.assert_array_equal(found.astype(np.float64), figures[..., index], name)
    return result


def numbers(kind):
    """Every value of the format, every midpoint, and their neighbours in float32; both signs."""
    table = KINDS[kind][0]
    values = table.VALUES[: len(table.VALUES) // 2]
    values = values[np.isfinite(values)]
    exact = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    near = [np.nextafter(exact, np.float32(way)) for way in (-np.inf, np.inf)]
    magnitude = np.unique(np.concatenate([exact, *near]))
    magnitude = magnitude[(magnitude >= 0) & (magnitude <= table.MAX)]
    return np.concatenate([magnitude, -magnitude])


@backends
@kinds
@rules
@pytest.mark.parametrize("exponent", [-119, 0, 100])
def test_every_code_and_every_midpoint(kind, rule, backend, exponent, device):
    """Every eighth exactly, times a power of two; under one scale, then under the best one."""
    table = KINDS[kind][0]
    values = numbers(kind)
    values = np.pad(values, (0, -len(values) % 31)).reshape(-1, 31)
    largest = np.full((len(values), 1), table.MAX)  # fixes s_max, whatever is beside it
    x = torch.from_numpy(np.hstack([values, largest]) * 2.0**exponent).float().to(device)
    result = check(x, kind, rule, (1, 32), backend)
    if rule is ScaleRule.MAX:
        assert (result.scales == exponent + 127).all()
        gone = 2 if kind == "fp8" else 1  # NaN, -0
        assert len(np.unique(one_per_byte(result.codes, kind))) == len(table.VALUES) - gone


@backends
@kinds
@rules
def test_every_scale(kind, rule, backend, device):
    """Each float32 exponent, subnormals too, at, below and above the mantissa that doubles S."""
    table = KINDS[kind][0]
    fraction = np.float32(table.MAX / 2.0 ** np.floor(np.log2(table.MAX)))
    fractions = [1, np.nextafter(fraction, np.float32(0)), fraction]
    fractions += [np.nextafter(fraction, np.float32(2)), np.nextafter(np.float32(2), np.float32(0))]
    exponents = np.arange(-149, 128)
    amax = np.ldexp(np.array(fractions, np.float32)[:, None], exponents).astype(np.float32).ravel()
    x = np.zeros((amax.size, 4), np.float32)
    x[:, 1], x[:, 2], x[:, 3] = amax, -amax / 3, amax / 7
    result = check(torch.from_numpy(x).to(device), kind, rule, (1, 4), backend)
    highest = {"fp4": 126, "fp8": 120}[kind]
    if rule is ScaleRule.MAX:
        assert np.unique(result.scales.cpu().numpy()).tolist() == list(range(highest + 128))


@backends
@kinds
@rules
def test_zeros_and_signs(kind, rule, backend, device):
    """-0, and a negative value that is flushed, keep their sign in FP8 and lose it in FP4."""
    x = torch.zeros(3, 4, device=device)
    x[1, 0], x[1, 3] = -0.0, -0.0
    x[2] = torch.tensor([-448.0, -(2.0**-20), 2.0**-20, -0.0])
    result = check(x, kind, rule, (1, 4), backend)
    assert result.scales[:2].flatten().tolist() == [KINDS[kind][2]] * 2
    minus = 0x80 if kind == "fp8" else 0
    codes = one_per_byte(result.codes, kind).tolist()
    assert codes[:2] == [[0, 0, 0, 0], [minus, 0, 0, minus]]
    assert codes[2][1:] == [minus, 0, minus]
    assert result.flushed.flatten().tolist() == [0, 0, 2]


CASES = [
    ("fp4", (5, 70), (1, 32)),
    ("fp4", (7, 24), (1, 12)),
    ("fp4", (3, 128), (1, 64)),
    ("fp4", (2, 300), (1, 300)),
    ("fp8", (9, 20), (3, 5)),
    ("fp8", (10, 70), (4, 32)),
    ("fp8", (33, 200), (128, 128)),
    ("fp8", (1, 1), (2, 2)),
]


@backends
@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "shape", "block"), CASES, ids=str)
def test_blocks_and_ragged_edges(kind, shape, block, dtype, rule, backend, device):
    """Log-normal values: wide enough a range for every candidate to win somewhere."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=draw) * torch.randn(shape, generator=draw).mul(2).exp()
    check(x.to(device, dtype), kind, rule, block, backend)


@backends
@kinds
def test_least_squares_takes_another_scale_somewhere(kind, backend, device):
    """Else nothing above would show that it does. In FP4 a good part of blocks wins by it."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(64, 64, generator=draw).to(device)
    if kind == "fp8":  # one value hardly too large for the smaller scale, others that it holds
        x = torch.full((64, 64), 2.0**-10, device=device)
        x[:, ::32] = torch.linspace(224.5, 300, 128).view(64, 2).to(device)
    result, plain = (quantise(x, kind, rule, (1, 32), backend) for rule in reversed(ScaleRule))
    lower = (result.scales < plain.scales).float().mean().item()
    assert 0.05 < lower < 0.95
    assert (result.error_squares <= plain.error_squares).all()
    assert ((result.error_squares < plain.error_squares) == (result.scales < plain.scales)).all()
    assert not plain.saturated.any() and result.saturated.any()


@backends
def test_a_smaller_scale_must_win_by_a_margin(backend, device):
    """232 errs by 8 under both; c is nearer by a hair, or by more, under the smaller."""
    rows = [[232.0, 2.0**-11 * (1 + tiny), 0.0, 0.0] for tiny in (0.0, 2.0**-23, 2.0**-10)]
    x = torch.tensor(rows, device=device)
    result = check(x, "fp8", ScaleRule.LEAST_SQUARES, (1, 4), backend)
    assert result.scales.flatten().tolist() == [127, 127, 126]
    check(x[2:], "fp8", ScaleRule.LEAST_SQUARES, (1, 4), backend)  # no other block decides for it
    c = Fraction(rows[1][1])
    gain = c**2 - (Fraction(1, 2**10) - c) ** 2
    assert 0 < gain < 64 * Fraction(1, 2**40) and 64 + float(gain) > 64


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["fp4", "fp8"]),
    st.lists(st.integers(-(2**14), 2**14), min_size=8, max_size=8),
    st.integers(-140, 100),
    st.integers(0, 10),
)
def test_least_of_all_exponents(kind, mantissas, exponent, squeeze):
    """Exactly, in fractions: no exponent at all is better, and MAX is never better."""
    top = mantissas[0]
    x = [float(np.float32(top * 2.0**exponent))]
    x += [float(np.float32(m * 2.0 ** (exponent - squeeze))) for m in mantissas[1:]]
    block = (1, len(x))
    grid = sorted({Fraction(float(v)) for v in KINDS[kind][0].VALUES if np.isfinite(v)})

    def error(s):
        scale = Fraction(2) ** s
        return sum(min(abs(Fraction(v) - g * scale) for g in grid) ** 2 for v in x)

    best, plain = (
        quantise(torch.tensor([x]), kind, rule, block, "torch") for rule in reversed(ScaleRule)
    )
    chosen, s_max = (error(int(r.scales[0, 0]) - 127) for r in (best, plain))
    assert chosen <= s_max
    for s in range(max(int(plain.scales[0, 0]) - 133, -127), int(plain.scales[0, 0]) - 124):
        assert chosen * (1 - Fraction(1, 2**39)) <= error(s)
    assert abs(Fraction(best.error_squares.item()) - chosen) <= chosen * Fraction(1, 2**50)


@backends
@kinds
@rules
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_not_finite_is_refused_block_by_block(kind, rule, backend, bad, device):
    x = torch.linspace(-3, 5, 3 * 32).view(1, 96).to(device)
    clean = quantise(x, kind, rule, (1, 32), backend)
    x[0, 40] = bad
    result = quantise(x, kind, rule, (1, 32), backend)
    assert result.scales.tolist() == [[clean.scales[0, 0], 0xFF, clean.scales[0, 2]]]
    codes, expected = (one_per_byte(r.codes, kind) for r in (result, clean))
    expected[0, 32:64] = 0x7F if kind == "fp8" else 0
    np.testing.assert_array_equal(codes, expected)
    for name in FIGURES:
        figure = getattr(clean, name).clone()
        figure[0, 1] = 0
        assert torch.equal(getattr(result, name), figure)
    with pytest.raises(ValueError, match="it has no cost"):
        statistics(result, 96)


@backends
@pytest.mark.parametrize(("kind", "block"), [("fp4", (1, 32)), ("fp8", (4, 32))])
def test_stacks_and_strides(kind, block, backend, same, device):
    """A layer's experts in one call are each expert alone; so is any view of the same values."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 6, 72, generator=draw).to(device)
    rule = ScaleRule.LEAST_SQUARES
    whole = quantise(x, kind, rule, block, backend)
    for index in [(0, 0), (0, 2), (1, 1)]:
        for part, alone in zip(whole, quantise(x[index], kind, rule, block, backend), strict=True):
            assert torch.equal(part[index], alone)
    swapped = quantise(x.transpose(0, 1), kind, rule, block, backend)
    for part, found in zip(whole, swapped, strict=True):
        assert found.is_contiguous() and torch.equal(found, part.transpose(0, 1))
    each = statistics(whole, 6 * 72)
    assert len(each) == 6
    assert each[4] == statistics(quantise(x[1, 1], kind, rule, block, backend), 6 * 72)[0]


@kinds
def test_statistics_are_added_in_block_order(kind, device):
    draw = torch.Generator().manual_seed(4)
    shape = 37, 352
    x = torch.randn(shape, generator=draw) * torch.randn(shape, generator=draw).exp()
    x[4:8, :32], x[12:16, 32:64], x[20, 40:44] = 2.0**-9, 0, 2.0**-20
    block = (1, 32) if kind == "fp4" else (4, 32)
    rule = ScaleRule.LEAST_SQUARES
    (found,) = statistics(quantise(x.to(device), kind, rule, block), x.numel())
    _, scales, figures = oracle(x, kind, rule, block)
    value_squares = error_squares = 0.0
    for row in figures:  # from left to right, then from top to bottom
        row_values = row_errors = 0.0
        for each in row:
            row_values, row_errors = row_values + each[0], row_errors + each[1]
        value_squares, error_squares = value_squares + row_values, error_squares + row_errors
    assert found == Cost(
        values=x.numel(),
        value_squares=value_squares,
        error_squares=error_squares,
        largest_error=figures[..., 2].max(),
        saturated=figures[..., 3].sum(),
        flushed=figures[..., 4].sum(),
        blocks=figures[..., 0].size,
        exact_blocks=(figures[..., 1] == 0).sum(),
        exponents=Counter((scales.astype(int) - 127).ravel().tolist()),
    )
    assert found.flushed and found.error_squares and 0 < found.exact_blocks < found.blocks
    sums = found.value_squares, found.error_squares
    flat = figures.reshape(-1, 5)[:, :2]
    assert sums != tuple(flat.sum(0)) and sums != tuple(np.cumsum(flat, 0)[-1])  # other orders


@backends
@rules
@pytest.mark.parametrize("fmt", [FP4, fp8((4, 32)), fp8((3, 5))], ids=str)
def test_what_is_on_a_grid_stays(fmt, rule, backend, same, device):
    """Codes and scales of any kind decode to values that come back as they are."""
    draw = np.random.default_rng(5)
    shape = (8, 64)
    width = 32 if fmt.kind == "fp4" else 64
    codes = draw.integers(0, 256, (8, width), np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    codes = torch.from_numpy(codes).to(device)
    scales = torch.from_numpy(draw.integers(0, 240, fmt.scale_shape(shape), np.uint8)).to(device)
    values = ops.block_dequant(codes, scales, fmt, torch.float32)
    result = quantise(values, fmt.kind, rule, fmt.block, backend)
    again = ops.block_dequant(result.codes, result.scales, fmt, torch.float32)
    same(again, values + 0.0 if fmt.kind == "fp4" else values)
    assert not result.error_squares.any() and not result.largest_errors.any()
    twice = quantise(again, fmt.kind, rule, fmt.block, backend)
    assert torch.equal(twice.codes, result.codes) and torch.equal(twice.scales, result.scales)


@backends
@rules
def test_fp4_through_fp8_and_bf16_and_back(rule, backend, same, device):
    draw = torch.Generator().manual_seed(6)
    packed = torch.randint(0, 256, (2, 8, 64), generator=draw, dtype=torch.uint8).to(device)
    scales = torch.randint(100, 112, (2, 8, 4), generator=draw, dtype=torch.uint8).to(device)
    target = fp8((4, 64))
    values = ops.fp4_to_bf16(packed, scales)[0]
    tiles = ops.fp4_to_fp8(packed, scales, FP4, target, backend=backend)
    assert not tiles.verdicts.any()
    for there in (values, ops.block_dequant(tiles.codes, tiles.scales, target, torch.float32)):
        back = ops.quantise_fp4(there, rule, backend=backend)
        same(ops.block_dequant(back.codes, back.scales, FP4), values)
        assert not back.error_squares.any()


@backends
@rules
def test_exact_roads_are_the_cpu_s(rule, backend, device):
    """Where the exact numba casts take a matrix, the lossy ones give the same bytes."""
    draw = np.random.default_rng(7)
    codes = draw.integers(0, 256, (8, 64), np.uint8)
    scales = draw.integers(2, 250, (8, 4), np.uint8)
    codes[2], codes[3, :16], scales[4] = 0, 0x88, 250
    values = torch.from_numpy(codes), torch.from_numpy(scales)
    bits = ops.block_dequant(*values, FP4).view(torch.int16).numpy().view(np.uint16)
    result = ops.quantise_fp4(_bf16(bits, device), rule, backend=backend)
    out_scales, out = np.empty((8, 4), np.uint8), np.empty((8, 64), np.uint8)
    assert bf16_to_fp4_exact(bits, 32, out_scales, out, np.zeros(3, np.int64)) == 0
    np.testing.assert_array_equal(result.scales.cpu().numpy(), out_scales)
    np.testing.assert_array_equal(result.codes.cpu().numpy(), out)

    codes = (
        draw.integers(0, 0x7F, (8, 128), np.uint8) | draw.integers(0, 2, (8, 128), np.uint8) << 7
    )
    codes[4:, :32], scales = 0, draw.integers(10, 240, (2, 4), np.uint8)
    values = torch.from_numpy(codes), torch.from_numpy(scales)
    bits = ops.block_dequant(*values, fp8((4, 32))).view(torch.int16).numpy().view(np.uint16)
    result = ops.quantise_fp8(_bf16(bits, device), rule, (4, 32), backend=backend)
    out_scales, out = np.empty((2, 4), np.uint8), np.empty((8, 128), np.uint8)
    assert bf16_to_fp8_exact(bits, 4, 32, out_scales, out, np.zeros(3, np.int64)) == 0
    np.testing.assert_array_equal(result.scales.cpu().numpy(), out_scales)
    np.testing.assert_array_equal(result.codes.cpu().numpy(), out)


def _bf16(bits, device):
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(device)


@backends
@kinds
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 32), (0, 3, 32)])
def test_empty(kind, backend, shape, device):
    result = quantise(torch.zeros(shape, device=device), kind, ScaleRule.MAX, (1, 32), backend)
    width = shape[-1] // 2 if kind == "fp4" else shape[-1]
    assert result.codes.shape == (*shape[:-1], width)
    scale_shape = (*shape[:-2], *Format("fp4", (1, 32), "e8m0").scale_shape(shape[-2:]))
    assert all(part.shape == scale_shape for part in result[1:])
    for found in statistics(result, 0):
        assert found == Cost()


@backends
@kinds
def test_wrong_operands_are_refused(kind, backend, device):
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        double = torch.zeros(2, 32, dtype=torch.float64, device=device)
        quantise(double, kind, ScaleRule.MAX, (1, 32), backend)
    x = torch.zeros(2, 32, device=device)
    with pytest.raises(ValueError, match="at least one"):
        quantise(x, kind, ScaleRule.MAX, (1, 0), backend)
    if kind == "fp4":
        for width, group in ((31, 32), (30, 5)):
            with pytest.raises(ValueError, match="must be even"):
                quantise(x[:, :width], kind, ScaleRule.MAX, (1, group), backend)


@kinds
@rules
def test_twins_agree_on_any_bits(kind, rule, same, device):
    """Any 32 bits at all: infinities, NaN payloads and subnormals beside the largest numbers."""

    @settings(deadline=None, max_examples=25)
    @given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=24, max_size=24))
    def agree(bits):
        x = torch.tensor(bits, dtype=torch.int32, device=device).view(torch.float32).view(2, 12)
        for found, expected in pairwise(quantise(x, kind, rule, (1, 4), b) for b in BACKENDS):
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other)

    agree()


@kinds
def test_definition_bits_do_not_depend_on_threads(kind, threads, device):
    x = torch.randn(130, 512, generator=torch.Generator().manual_seed(8)).to(device)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(quantise(x, kind, ScaleRule.LEAST_SQUARES, (1, 32), "torch"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
