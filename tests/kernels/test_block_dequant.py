"""block_dequant against the format tables: every code under every scale, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.formats.blocks import BF16, FP4, Format, Tensor, fp8
from dsv4_quant.kernels import ops

BACKENDS = ("torch", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def rounded(values, dtype):
    """numpy float32 -> torch of dtype, rounded by ml_dtypes."""
    if dtype == torch.float32:
        return torch.from_numpy(values)
    bits = values.astype(ml_dtypes.bfloat16).view(np.int16)
    return torch.from_numpy(bits).view(torch.bfloat16)


@backends
@dtypes
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_every_code_under_every_scale_byte(kind, dtype, backend, same, device):
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).to(device)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].to(device)
    if kind == "fp8":
        fmt, values = fp8((1, 256)), e4m3.VALUES
    else:
        fmt, values = (
            Format("fp4", (1, 512), "e8m0"),
            e2m1.VALUES[e2m1.unpack(np.arange(256, dtype=np.uint8))],
        )
    expected = values * e8m0.VALUES[:, None]  # float32: exact, or out of range
    found = ops.block_dequant(codes, scales, fmt, dtype, backend=backend)
    same(found, rounded(expected, dtype))


@backends
@dtypes
def test_float32_scales(dtype, backend, same, device):
    """Powers of two, others, zero, negative, subnormal, infinite and NaN scales: one product."""
    factors = [1, 0.5, 0.3, 0, -0.0, -3, 1e-45, 2.0**-126, 3e38, np.inf, -np.inf, np.nan]
    scales = np.array(factors, np.float32)[:, None]
    codes = np.arange(256, dtype=np.uint8)[None].repeat(len(scales), 0)
    found = ops.block_dequant(
        torch.from_numpy(codes).to(device),
        torch.from_numpy(scales).to(device),
        fp8((1, 256), "f32"),
        dtype,
        backend=backend,
    )
    same(found, rounded(e4m3.VALUES[codes] * scales, dtype))


@backends
@pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        (fp8((128, 128)), (130, 260)),
        (fp8((128, 128), "f32"), (128, 128)),
        (fp8((32, 32)), (70, 40)),
        (fp8((3, 5)), (7, 12)),
        (fp8((1, 64)), (5, 448)),
        (FP4, (9, 96)),
        (FP4, (4, 70)),
        (Format("fp4", (2, 6), "e8m0"), (5, 20)),
        (FP4, (1, 2)),
    ],
    ids=str,
)
def test_blocks_and_ragged_edges(fmt, shape, backend, same, device):
    draw = np.random.default_rng(0)
    columns = shape[1] // (2 if fmt.kind == "fp4" else 1)
    codes = draw.integers(0, 256, (shape[0], columns), np.uint8)
    scales = draw.integers(90, 160, fmt.scale_shape(shape), np.uint8)
    stored = scales if fmt.scale == "e8m0" else e8m0.VALUES[scales]
    expected = Tensor(fmt, shape, codes, stored).decode()
    operands = (torch.from_numpy(part).to(device) for part in (codes, stored))
    same(ops.block_dequant(*operands, fmt, torch.float32, backend=backend), torch.tensor(expected))


@backends
def test_stacks_strides_and_byte_types(backend, same, device):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 2, 40, 96), generator=draw, dtype=torch.uint8).to(device)
    scales = torch.randint(100, 140, (3, 2, 2, 3), generator=draw, dtype=torch.uint8).to(device)
    fmt = fp8((32, 32))
    found = ops.block_dequant(codes, scales, fmt, backend=backend)
    for index in np.ndindex(3, 2):
        same(found[index], ops.block_dequant(codes[index], scales[index], fmt, backend=backend))
    views = codes.transpose(0, 1), scales.transpose(0, 1)
    same(ops.block_dequant(*views, fmt, backend=backend), found.transpose(0, 1).contiguous())
    typed = codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)
    same(ops.block_dequant(*typed, fmt, backend=backend), found)

    packed, scales = codes[0, 0], scales.new_full((40, 6), 127)
    found = ops.block_dequant(packed, scales, FP4, backend=backend)
    for as_stored in (packed.view(torch.int8), packed.view(torch.float4_e2m1fn_x2)):
        same(ops.block_dequant(as_stored, scales, FP4, backend=backend), found)


@backends
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (2, 0, 64), (0, 5, 64)])
@pytest.mark.parametrize("fmt", [fp8((4, 32)), FP4], ids=str)
def test_empty(shape, fmt, backend, device):
    rows, cols = shape[-2:]
    width = cols // 2 if fmt.kind == "fp4" else cols
    codes = torch.zeros(*shape[:-1], width, dtype=torch.uint8, device=device)
    scales = torch.zeros(
        *shape[:-2], *fmt.scale_shape((rows, cols)), dtype=torch.uint8, device=device
    )
    assert ops.block_dequant(codes, scales, fmt, backend=backend).shape == shape


@backends
def test_wrong_operands_are_refused(backend, device):
    codes = torch.zeros(4, 64, dtype=torch.uint8, device=device)
    scales = torch.zeros(1, 2, dtype=torch.uint8, device=device)

    fmt = fp8((4, 32))
    for error, match, operands in [
        (ValueError, "expected", (codes, scales, fp8((2, 32)))),
        (ValueError, "not a block format", (codes, scales, BF16)),
        (ValueError, "even along K", (codes, scales, Format("fp4", (1, 5), "e8m0"))),
        (TypeError, "one-byte", (codes.int(), scales, fmt)),
        (TypeError, "one-byte", (codes, scales.bfloat16(), fmt)),
        (TypeError, "decodes to", (codes, scales, fmt, torch.float16)),
    ]:
        with pytest.raises(error, match=match):
            ops.block_dequant(*operands, backend=backend)


def test_definition_bits_do_not_depend_on_threads(same, threads, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).repeat(301, 3)
    scales = torch.arange(301 * 24, device=device).remainder(200).view(301, 24).to(torch.uint8)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(ops.block_dequant(codes, scales, fp8((1, 32)), backend="torch"))
    same(*results)
