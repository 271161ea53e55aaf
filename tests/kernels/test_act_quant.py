"""act_quant and fp4_act_quant: codes and scales against numpy and ml_dtypes, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.formats.blocks import FP4, Format
from dsv4_quant.kernels import ops
from dsv4_quant.kernels.defaults import ACT_AMAX_FLOOR, FP4_AMAX_FLOOR

BACKENDS = ("torch", "triton")
# name -> operation, format's table, largest value, floor of amax, ml_dtypes' type
KINDS = {
    "fp8": (ops.act_quant, e4m3, ACT_AMAX_FLOOR, ml_dtypes.float8_e4m3fn),
    "fp4": (ops.fp4_act_quant, e2m1, FP4_AMAX_FLOOR, ml_dtypes.float4_e2m1fn),
}
backends = pytest.mark.parametrize("backend", BACKENDS)
kinds = pytest.mark.parametrize("kind", KINDS)


def quantise(x, kind, backend, group=32):
    """Codes, one per byte, and scales, as numpy arrays."""
    codes, scales = KINDS[kind][0](x, group, backend=backend)
    assert codes.dtype == scales.dtype == torch.uint8
    assert codes.is_contiguous() and codes.device == x.device
    codes = codes.cpu().numpy()
    return (e2m1.unpack(codes) if kind == "fp4" else codes), scales.cpu().numpy()


def oracle(x, kind, group=32):
    """The rule, spelled out group by group in float64, rounded by ml_dtypes."""
    _, table, floor, narrow = KINDS[kind]
    codes, scales = [], []
    for row in x.double().cpu().numpy().reshape(-1, x.shape[-1]):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            amax = max(np.abs(part).max(), np.float64(np.float32(floor)))
            k = next(k for k in range(-127, 128) if amax <= table.MAX * 2.0**k)
            rounded = (part / 2.0**k).astype(np.float32).astype(narrow)
            codes.append(rounded.view(np.uint8))
            scales.append(k + e8m0.BIAS)
    return np.concatenate(codes).reshape(x.shape), np.array(scales).reshape(*x.shape[:-1], -1)


def check(x, kind, backend, group=32):
    codes, scales = quantise(x, kind, backend, group)
    expected_codes, expected_scales = oracle(x, kind, group)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(codes, expected_codes)


def numbers(kind):
    """Every value of the format, every midpoint, and their neighbours in float32; both signs."""
    table = KINDS[kind][1]
    values = table.VALUES[: len(table.VALUES) // 2]
    values = values[np.isfinite(values)]
    exact = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    near = [np.nextafter(exact, np.float32(way)) for way in (-np.inf, np.inf)]
    magnitude = np.unique(np.concatenate([exact, *near]))
    magnitude = magnitude[(magnitude >= 0) & (magnitude <= table.MAX)]
    return np.concatenate([magnitude, -magnitude])


@backends
@kinds
@pytest.mark.parametrize("exponent", [-22, -3, 0, 5, 100])
def test_every_code_and_every_midpoint(kind, backend, exponent, device):
    table = KINDS[kind][1]
    values = numbers(kind)
    values = np.pad(values, (0, -len(values) % 30)).reshape(-1, 30)
    largest = np.full((len(values), 2), [table.MAX, 0.0])  # fixes the scale, whatever is beside it
    x = torch.from_numpy(np.hstack([values, largest]) * 2.0**exponent).float().to(device)
    codes, scales = quantise(x, kind, backend)
    assert (scales == exponent + e8m0.BIAS).all()
    nan_codes = 2 if kind == "fp8" else 0
    assert len(np.unique(codes)) == len(table.VALUES) - nan_codes  # all were met
    check(x, kind, backend)


@backends
@kinds
def test_every_scale(kind, backend, device):
    """Each float32 exponent, at, below and above the mantissa at which the scale doubles."""
    _, table, floor, _ = KINDS[kind]
    fraction = np.float32(table.MAX / 2.0 ** np.floor(np.log2(table.MAX)))
    fractions = [1, np.nextafter(fraction, np.float32(0)), fraction]
    fractions += [np.nextafter(fraction, np.float32(2)), np.nextafter(np.float32(2), np.float32(0))]
    exponents = np.arange(-126, 128)
    amax = np.ldexp(np.array(fractions, np.float32)[:, None], exponents).astype(np.float32).ravel()
    x = np.zeros((amax.size, 4), np.float32)
    x[:, 1], x[:, 2], x[:, 3] = amax, -amax / 3, amax / 7
    x = torch.from_numpy(x).to(device)
    check(x, kind, backend, group=4)
    _, scales = quantise(x, kind, backend, group=4)
    lowest = np.ceil(np.log2(floor / table.MAX))
    highest = np.ceil(np.log2(amax.max() / table.MAX))
    reached = np.arange(lowest, highest + 1).astype(int) + e8m0.BIAS
    np.testing.assert_array_equal(np.unique(scales), reached)


@backends
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subnormals_and_zeros(kind, backend, dtype, device):
    tiny = np.float32(2.0**-126)
    values = np.ldexp(np.float32(1), -np.arange(118, 150, dtype=np.int32)).astype(np.float32)
    values = np.concatenate([values * s for s in (1, -1, 1.5, 0)] + [tiny * np.arange(32) / 8])
    x = torch.from_numpy(values.astype(np.float32)).view(-1, 32).to(device, dtype)
    check(x, kind, backend)


@backends
@kinds
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), -float("nan")])
def test_not_finite_poisons_its_group_alone(kind, backend, bad, device):
    x = torch.linspace(-3, 5, 3 * 32).view(1, 96)
    clean_codes, clean_scales = quantise(x.to(device), kind, backend)
    x[0, 40] = bad
    codes, scales = quantise(x.to(device), kind, backend)
    assert scales.tolist() == [[clean_scales[0, 0], e8m0.NAN, clean_scales[0, 2]]]
    assert (codes[0, 32:64] == (0x7F if kind == "fp8" else 0)).all()
    np.testing.assert_array_equal(codes[0, :32], clean_codes[0, :32])
    np.testing.assert_array_equal(codes[0, 64:], clean_codes[0, 64:])


@backends
@kinds
@pytest.mark.parametrize(
    ("shape", "group"),
    [((5, 70), 32), ((2, 3, 96), 32), ((1, 2), 32), ((7, 24), 12), ((40,), 64), ((300, 4), 2)],
)
def test_ragged_shapes_and_odd_groups(kind, backend, shape, group, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    check(x, kind, backend, group)


@backends
@kinds
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 32), (0,)])
def test_empty(kind, backend, shape, device):
    codes, scales = quantise(torch.zeros(shape, device=device), kind, backend)
    assert codes.shape == shape
    assert scales.shape == (*shape[:-1], -(-shape[-1] // 32))


@backends
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(kind, backend, dtype, device):
    x = torch.randn(64, 6, 40, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    for view in (x.transpose(0, 2), x[::2, 1:4, 3:37], x[:, :1].expand(64, 5, 40)):
        found, expected = (quantise(v, kind, backend) for v in (view, view.contiguous()))
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


@backends
@kinds
def test_round_trip_is_the_identity_on_quantised_values(kind, backend, same, device):
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3)).to(device)
    fmt = FP4 if kind == "fp4" else Format("fp8", (1, 32), "e8m0")
    first = KINDS[kind][0](x, 32, backend=backend)
    values = ops.block_dequant(*first, fmt, backend=backend)
    again = KINDS[kind][0](values, 32, backend=backend)  # maybe of another scale: amax is rounded
    same(ops.block_dequant(*again, fmt, backend=backend), values)


@backends
@kinds
def test_wrong_operands_are_refused(kind, backend, device):
    quantise = KINDS[kind][0]
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        quantise(torch.zeros(2, 32, dtype=torch.float64, device=device), backend=backend)
    with pytest.raises(ValueError, match="at least one"):
        quantise(torch.zeros(2, 32, device=device), 0, backend=backend)
    if kind == "fp4":
        for width, group in ((31, 32), (30, 5)):
            with pytest.raises(ValueError, match="must be even"):
                quantise(torch.zeros(2, width, device=device), group, backend=backend)


@kinds
def test_twins_agree_on_any_bits(kind, same, device):
    """Any 32 bits at all, NaN payloads and subnormals included."""

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=24, max_size=24))
    def agree(bits):
        x = torch.tensor(bits, dtype=torch.int32, device=device).view(torch.float32).view(2, 12)
        found, expected = (KINDS[kind][0](x, 8, backend=backend) for backend in BACKENDS)
        same(found[0], expected[0])
        same(found[1], expected[1])

    agree()


@kinds
def test_definition_bits_do_not_depend_on_threads(kind, same, threads, device):
    x = torch.randn(257, 512, generator=torch.Generator().manual_seed(4)).to(device)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(KINDS[kind][0](x, backend="torch"))
    same(results[0][0], results[1][0])
    same(results[0][1], results[1][1])


@kinds
def test_published_scale_rule(kind):
    """The published code rounds amax * (1 / top) before its ceiling: the same scale for every
    float32 mantissa, so that the rule may be stated without a rounding."""
    top = np.float32(KINDS[kind][1].MAX)
    amax = (np.arange(2**23, dtype=np.uint32) | (127 << 23)).view(np.float32)
    bits = (amax * (np.float32(1) / top)).view(np.uint32)
    published = (bits >> 23).astype(np.int32) - 127 + ((bits & 0x7FFFFF) != 0)
    fraction, exponent = np.frexp(amax)
    top_fraction, top_exponent = np.frexp(top)
    np.testing.assert_array_equal(published, exponent - top_exponent + (fraction > top_fraction))
