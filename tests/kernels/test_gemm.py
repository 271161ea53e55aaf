"""fp8_gemm and fp4_gemm: the definition against exact sums, the twin within its bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.formats.blocks import FP4, Format, Tensor, fp8
from dsv4_quant.kernels import ops
from dsv4_quant.kernels.bounds_torch import gemm_bound

BACKENDS = ("torch", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)

# weight format, group of the activations, (M, N, K)
CASES = [
    (fp8((128, 128)), 128, (3, 130, 256)),
    (fp8((128, 128)), 128, (20, 70, 200)),  # ragged in all three
    (fp8((128, 128), "f32"), 128, (5, 129, 130)),
    (fp8((32, 32)), 128, (17, 40, 160)),  # blocks narrower than groups
    (fp8((128, 128)), 32, (4, 16, 192)),  # and wider
    (fp8((3, 5)), 7, (2, 8, 23)),  # step 1
    (fp8((64, 512)), 512, (2, 5, 1100)),
    (FP4, 128, (3, 66, 256)),
    (FP4, 128, (33, 20, 150)),
    (FP4, 48, (2, 9, 96)),
    (Format("fp4", (4, 64), "f32"), 64, (6, 10, 128)),
]
cases = pytest.mark.parametrize(("fmt", "group", "shape"), CASES, ids=str)


def gemm(fmt):
    return ops.fp4_gemm if fmt.kind == "fp4" else ops.fp8_gemm


def operands(fmt, group, shape, seed=0):
    """Random finite codes and scales of a model's spread, as format tensors (x, weight)."""
    draw = np.random.default_rng(seed)
    m, n, k = shape
    numbers = np.delete(np.arange(256, dtype=np.uint8), e4m3.NAN_CODES)
    x_format = fp8((1, group))
    x = draw.choice(numbers, (m, k))
    x_scales = draw.integers(110, 118, x_format.scale_shape((m, k)), np.uint8)
    if fmt.kind == "fp4":
        codes = draw.integers(0, 256, (n, k // 2), np.uint8)
    else:
        codes = draw.choice(numbers, (n, k))
    scales = draw.integers(114, 122, fmt.scale_shape((n, k)), np.uint8)
    stored = e8m0.VALUES[scales] if fmt.scale == "f32" else scales
    return Tensor(x_format, (m, k), x, x_scales), Tensor(fmt, (n, k), codes, stored)


def arguments(x, weight, device):
    """The tensors of a call."""
    parts = (x.codes, x.scales, weight.codes, weight.scales)
    return tuple(torch.from_numpy(part).to(device) for part in parts)


def exact(x, weight):
    """The product and its magnitude. float64 sums these exactly: at most 15 bits of scales and 36
    of products and their sum."""
    a, b = x.decode().astype(np.float64), weight.decode().astype(np.float64).T
    return torch.from_numpy(a @ b), torch.from_numpy(np.abs(a) @ np.abs(b))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_definition_is_the_exact_sum_rounded(fmt, group, shape, dtype, same, device):
    x, weight = operands(fmt, group, shape)
    found = gemm(fmt)(*arguments(x, weight, device), fmt, group, dtype, backend="torch")
    same(found, exact(x, weight)[0].float().to(dtype))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twin_is_within_its_bound(fmt, group, shape, dtype, near, device):
    x, weight = operands(fmt, group, shape, seed=1)
    found = gemm(fmt)(*arguments(x, weight, device), fmt, group, dtype, backend="triton")
    assert found.dtype == dtype
    total, magnitude = exact(x, weight)
    step = math.gcd(group, fmt.block[1])
    near(found, total.float().to(dtype), gemm_bound(magnitude, shape[2], step, dtype))


def test_the_bound_notices_one_wrong_code():
    """What the bound is worth: the least change of one FP4 code, at a real K, is beyond it."""
    shape = (16, 1, 4096)
    activations = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(0))
    codes, scales = (part.numpy() for part in ops.act_quant(activations, backend="torch"))
    x = Tensor(fp8((1, 128)), codes.shape, codes, scales)
    weight = operands(FP4, 128, shape)[1]
    weight.scales[:] = e8m0.BIAS
    weight.codes[0, 1000] &= 0xF0  # 0, and then 0.5
    before, magnitude = exact(x, weight)
    weight.codes[0, 1000] |= 0x01
    moved = (exact(x, weight)[0] - before).abs()
    assert (moved > gemm_bound(magnitude, shape[2], 32, torch.float32)).sum() > shape[0] // 2


@backends
def test_every_pair_of_fp8_codes(backend, same, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    ones = torch.full_like(codes, e8m0.BIAS)
    found = ops.fp8_gemm(codes, ones, codes, ones, fp8((1, 1)), 1, torch.float32, backend=backend)
    same(found, torch.from_numpy(np.multiply.outer(e4m3.VALUES, e4m3.VALUES) + np.float32(0)))


@backends
def test_every_fp4_byte_against_every_fp8_code(backend, same, device):
    """Column 0 of the weight meets the codes, column 1 meets 1."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    one = int(np.flatnonzero(e4m3.VALUES == 1)[0])
    x = torch.stack((codes, torch.full_like(codes, one)), -1)
    scales = torch.full_like(codes, e8m0.BIAS)[:, None]
    fmt = Format("fp4", (1, 2), "e8m0")
    found = ops.fp4_gemm(x, scales, codes[:, None], scales, fmt, 2, torch.float32, backend=backend)
    weight = e2m1.VALUES[e2m1.unpack(np.arange(256, dtype=np.uint8)[:, None])]
    same(found, torch.from_numpy(e4m3.VALUES[:, None] * weight[:, 0] + weight[:, 1] + 0))


@backends
@pytest.mark.parametrize("fmt", [fp8((1, 32)), FP4], ids=str)
def test_every_scale_byte(fmt, backend, same, device):
    """One product per sum, so that even the twin must be exact: 3 * 2**(byte - 127) * 2**shift."""
    scales = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    x = torch.zeros(2, 32, dtype=torch.uint8, device=device)
    x[:, 0] = int(np.flatnonzero(e4m3.VALUES == 1)[0])
    x_scales = torch.tensor([[127], [105]], dtype=torch.uint8, device=device)
    three = int(np.flatnonzero((e2m1 if fmt.kind == "fp4" else e4m3).VALUES == 3)[0])
    weight = torch.zeros(256, 32 // (2 if fmt.kind == "fp4" else 1), dtype=torch.uint8)
    weight[:, 0] = three
    found = gemm(fmt)(
        x, x_scales, weight.to(device), scales, fmt, 32, torch.float32, backend=backend
    )
    expected = 3 * e8m0.VALUES.astype(np.float64) * np.array([[1], [2.0**-22]])
    same(found, torch.from_numpy(expected.astype(np.float32)))
    scaled = gemm(
        fmt
    )(  # the same bytes as scales of the activations
        x[:1].expand(256, 32),
        scales,
        weight[:1].to(device),
        x_scales[:1],
        fmt,
        32,
        torch.float32,
        backend=backend,
    )
    same(scaled[:, 0], found[0])


@backends
@pytest.mark.parametrize("fmt", [fp8((32, 32)), FP4], ids=str)
def test_nan_reaches_its_row_and_column_only(fmt, backend, device):
    x, weight = operands(fmt, 32, (4, 64, 64))
    x.codes[1, 40] = e4m3.NAN_CODES[1]
    x.scales[2, 0] = e8m0.NAN
    weight.scales[0, 1] = e8m0.NAN
    found = gemm(fmt)(*arguments(x, weight, device), fmt, 32, backend=backend).cpu()
    rows = fmt.block[0]
    assert found[1:3].isnan().all() and found[:, :rows].isnan().all()
    assert found[[0, 3]][:, rows:].isfinite().all()


@backends
@pytest.mark.parametrize("fmt", [fp8((32, 32)), FP4], ids=str)
def test_leading_axes_strides_and_byte_types(fmt, backend, same, device):
    x, weight = operands(fmt, 32, (6, 20, 64))
    call, (a, a_scales, b, b_scales) = gemm(fmt), arguments(x, weight, device)
    flat = call(a, a_scales, b, b_scales, fmt, 32, backend=backend)
    shaped = a.view(2, 3, 64), a_scales.view(2, 3, 2)
    same(call(*shaped, b, b_scales, fmt, 32, backend=backend), flat.view(2, 3, 20))
    turned = (part.mT.contiguous().mT for part in (a, a_scales, b, b_scales))
    same(call(*turned, fmt, 32, backend=backend), flat)
    wide = b.repeat_interleave(2, 1)[:, ::2]
    same(call(a, a_scales, wide, b_scales, fmt, 32, backend=backend), flat)
    typed = (
        a.view(torch.float8_e4m3fn),
        a_scales.view(torch.float8_e8m0fnu),
        b.view(torch.int8),
        b_scales.view(torch.float8_e8m0fnu),
    )
    same(call(*typed, fmt, 32, backend=backend), flat)


@backends
@pytest.mark.parametrize("fmt", [fp8((32, 32)), FP4], ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 64), (3, 0, 64), (3, 4, 0)])
def test_empty(shape, fmt, backend, same, device):
    m, n, k = shape
    width = k // 2 if fmt.kind == "fp4" else k
    parts = ((m, k), (m, -(-k // 32)), (n, width), fmt.scale_shape((n, k)))
    tensors = (torch.zeros(part, dtype=torch.uint8, device=device) for part in parts)
    found = gemm(fmt)(*tensors, fmt, 32, backend=backend)
    same(found, torch.zeros(m, n, dtype=torch.bfloat16))


@backends
def test_wrong_operands_are_refused(backend, device):
    x, weight = operands(fp8((32, 32)), 32, (2, 32, 64))
    a, a_scales, b, b_scales = arguments(x, weight, device)
    fmt = fp8((32, 32))
    for error, match, call in [
        (ValueError, "takes an FP8 weight", (ops.fp8_gemm, a, a_scales, b, b_scales, FP4, 32)),
        (ValueError, "takes an FP4 weight", (ops.fp4_gemm, a, a_scales, b, b_scales, fmt, 32)),
        (ValueError, "group must be even", (ops.fp4_gemm, a, a_scales, b, b_scales, FP4, 5)),
        (ValueError, "do not fit", (ops.fp8_gemm, a[:, :32], a_scales, b, b_scales, fmt, 32)),
        (ValueError, "do not fit", (ops.fp8_gemm, a, a_scales, b, b_scales, fmt, 16)),
        (ValueError, "scales are", (ops.fp8_gemm, a, a_scales, b, b_scales[:, :1], fmt, 32)),
        (ValueError, "two axes", (ops.fp8_gemm, a, a_scales, b[None], b_scales[None], fmt, 32)),
        (TypeError, "one-byte", (ops.fp8_gemm, a.float(), a_scales, b, b_scales, fmt, 32)),
        (TypeError, "results are", (ops.fp8_gemm, a, a_scales, b, b_scales, fmt, 32, torch.half)),
    ]:
        with pytest.raises(error, match=match):
            call[0](*call[1:], backend=backend)


@pytest.mark.parametrize("fmt", [fp8((128, 128), "f32"), FP4], ids=str)
def test_definition_bits_depend_on_neither_threads_nor_batch(fmt, same, threads, device):
    x, weight = operands(fmt, 128, (64, 512, 1024))
    if fmt.scale == "f32":
        weight.scales[:] *= np.float32(1.1)  # a scale that is no power of two rounds every step
    tensors = arguments(x, weight, device)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(gemm(fmt)(*tensors, fmt, backend="torch"))
    same(*results)
    alone = gemm(fmt)(tensors[0][5:6], tensors[1][5:6], *tensors[2:], fmt, backend="torch")
    same(alone, results[0][5:6])
