"""fp4_to_bf16 and fp8_to_bf16 against ml_dtypes and the CPU casts: every bit, every flag."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.formats.blocks import FP4, Format, fp8
from dsv4_quant.kernels import fp4_to_bf16_numba, fp8_to_bf16_numba, jit_numba, ops
from dsv4_quant.kernels.verdicts import INEXACT, NAN

BACKENDS = ("torch", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)
FP4_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
FP4_VALUES[8] = 0.0  # the published table has no -0
FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
SCALES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
AWKWARD = [0.0, -0.0, 1e-45, 2.0**-127, 3 * 2.0**-128, 1.5, 0.1, -0.25, 1 + 2.0**-23]
AWKWARD += [2.0**-117, 2.0**-118, 2.0**119, 2.0**120, 3e38, np.inf, -np.inf, np.nan]


def decode(codes, scales, fmt, backend):
    """The operation on numpy arrays: BF16 bits and flags."""
    operands = [torch.from_numpy(np.ascontiguousarray(part)) for part in (codes, scales)]
    if torch.cuda.is_available():
        operands = [part.cuda() for part in operands]
    operation = ops.fp4_to_bf16 if fmt.kind == "fp4" else ops.fp8_to_bf16
    values, flags = operation(*operands, fmt, backend=backend)
    assert values.dtype == torch.bfloat16 and flags.dtype == torch.int32
    return values.cpu().view(torch.int16).numpy().view(np.uint16), flags.cpu().numpy()


def expected_bits(exact):
    """Of exact products in float64: rounded through float32, and which of two flags they raise."""
    rounded = exact.astype(np.float32).astype(ml_dtypes.bfloat16)
    nan = np.isnan(exact)
    bits = np.where(nan, 0x7FC0, rounded.view(np.uint16))
    return bits, np.where(nan, NAN, (rounded.astype(np.float64) != exact) * INEXACT)


def test_flags_are_the_cpu_s():
    assert (INEXACT, NAN) == (jit_numba.INEXACT, jit_numba.NAN)


@backends
def test_fp4_every_code_under_every_scale_byte(backend):
    """Each scale byte is a matrix of its own, in which every code occurs in both halves."""
    packed = np.arange(256, dtype=np.uint8)
    values = FP4_VALUES[np.stack([packed & 15, packed >> 4], -1).ravel()]
    bits, flags = expected_bits(values * SCALES[:, None])
    fmt, scales = Format("fp4", (1, 512), "e8m0"), np.arange(256, dtype=np.uint8)
    found, _ = decode(np.tile(packed, (256, 1)), scales[:, None], fmt, backend)
    np.testing.assert_array_equal(found, bits)
    some = [0, 1, 2, 127, 252, 253, 254, 255]
    _, found = decode(np.tile(packed, (len(some), 1, 1)), scales[some, None, None], fmt, backend)
    np.testing.assert_array_equal(found, np.bitwise_or.reduce(flags[some], -1))
    assert found.tolist() == [0, 0, 0, 0, 0, INEXACT, INEXACT, NAN]


@backends
def test_fp8_every_code_under_every_scale_byte(backend):
    every = codes = np.arange(256, dtype=np.uint8)
    bits, flags = expected_bits(FP8_VALUES * SCALES[:, None])
    fmt = fp8((1, 256))
    found, _ = decode(np.tile(codes, (256, 1)), every[:, None], fmt, backend)
    np.testing.assert_array_equal(found, bits)
    some = [2, 3, 127, 246, 247, 255]
    scales = SCALES[some].astype(np.float32)[:, None]
    found, _ = decode(np.tile(codes, (len(some), 1)), scales, fmt, backend)
    np.testing.assert_array_equal(found, bits[some])
    scales = np.array(some, np.uint8)[:, None, None]
    numbers = np.where((codes & 0x7F) == 0x7F, 0, codes)
    _, found = decode(np.tile(numbers, (len(some), 1, 1)), scales, fmt, backend)
    np.testing.assert_array_equal(found, np.bitwise_or.reduce(flags[some][:, numbers], -1))
    assert found.tolist() == [INEXACT, 0, 0, 0, INEXACT, NAN]


@backends
def test_fp8_awkward_float32_scales(backend):
    """Each a matrix: one product in float32, rounded; an infinite scale counts as NaN."""
    scales = np.array(AWKWARD, np.float32)[:, None, None]
    codes, many = np.arange(0x7F, dtype=np.uint8), (len(AWKWARD), 1, 1)
    finite = np.where(np.isinf(scales), np.nan, scales).astype(np.float64)
    bits, flags = expected_bits(FP8_VALUES[codes] * finite)
    found, found_flags = decode(np.tile(codes, many), scales, fp8((1, 127)), backend)
    np.testing.assert_array_equal(found, bits)
    np.testing.assert_array_equal(found_flags, np.bitwise_or.reduce(flags[:, 0], -1))


@backends
@pytest.mark.parametrize("code", e4m3.NAN_CODES)
def test_fp8_one_nan_code_leaves_its_neighbours_alone(code, backend):
    codes = np.full((2, 3, 70), 0x81, np.uint8)
    codes[1, 2, 65] = code
    bits, flags = decode(codes, np.full((2, 2, 3), 120, np.uint8), fp8((2, 32)), backend)
    assert flags.tolist() == [0, NAN]
    assert np.argwhere(bits == 0x7FC0).tolist() == [[1, 2, 65]]
    assert len(np.unique(bits)) == 2


@st.composite
def weights(draw):
    """Codes and scales of one matrix; blocks that the CPU casts take too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, kind = draw(st.integers(1, 12)), draw(st.sampled_from(["fp4", "fp8", "fp8 f32"]))
    low, high = draw(st.sampled_from([(0, 256), (100, 130)]))
    if kind == "fp4":
        fmt, cols = Format("fp4", (1, 64), "e8m0"), 64 * draw(st.integers(1, 3))
        codes = rng.integers(0, 256, (rows, cols // 2), np.uint8)
    else:
        fmt, cols = fp8(draw(st.sampled_from([(1, 32), (4, 32), (3, 5)]))), draw(st.integers(1, 70))
        codes = rng.integers(0, 256, (rows, cols), np.uint8)
        codes[(codes & 0x7F) == 0x7F] ^= draw(st.integers(0, 1))
    scales = rng.integers(low, high, fmt.scale_shape((rows, cols))).astype(np.uint8)
    if kind == "fp8 f32":
        any_float = rng.integers(0, 2**32, scales.shape, np.uint32).view(np.float32)
        scales = any_float if high == 256 else e8m0.VALUES[scales]
    return codes, scales, fmt


@pytest.mark.parametrize(("backend", "examples"), [("torch", 80), ("triton", 25)])
def test_the_cpu_casts_agree(backend, examples):
    @settings(deadline=None, max_examples=examples)
    @given(weights())
    def agree(weight):
        codes, scales, fmt = weight
        bits, flags = decode(codes, scales, fmt, backend)
        out = np.empty_like(bits)
        if fmt.kind == "fp4":
            status = fp4_to_bf16_numba.fp4_to_bf16(codes, scales, fmt.block[1], out)
        else:
            status = fp8_to_bf16_numba.fp8_to_bf16(codes, scales, 0, *fmt.block, out)
        np.testing.assert_array_equal(bits, out)
        assert flags == status

    agree()


@backends
@pytest.mark.parametrize("fmt", [FP4, Format("fp4", (2, 6), "e8m0"), fp8((4, 32))], ids=str)
def test_stacks_and_strides(fmt, backend, device):
    """A layer's experts in one call are each expert alone; so is any view; ragged blocks."""
    draw = torch.Generator().manual_seed(0)
    width = 35 if fmt.kind == "fp4" else 70
    codes = torch.randint(0, 256, (2, 3, 6, width), generator=draw, dtype=torch.uint8).to(device)
    shape = (2, 3, *fmt.scale_shape((6, 70)))
    scales = torch.randint(100, 120, shape, generator=draw, dtype=torch.uint8).to(device)
    operation = ops.fp4_to_bf16 if fmt.kind == "fp4" else ops.fp8_to_bf16
    codes[codes == 0x7F], codes[codes == 0xFF] = 0, 1
    scales[1, 2, -1, -1] = 0xFF
    values, flags = operation(codes, scales, fmt, backend=backend)
    assert flags.tolist() == [[0, 0, 0], [0, 0, NAN]]
    for index in [(0, 0), (1, 2)]:
        alone, flag = operation(codes[index], scales[index], fmt, backend=backend)
        assert _equal(values[index], alone) and flag.shape == () and flag == flags[index]
    views = codes.transpose(0, 1).view(torch.int8), scales.transpose(0, 1)
    swapped, flags = operation(*views, fmt, backend=backend)
    assert _equal(swapped, values.transpose(0, 1)) and flags[2, 1] == NAN


def _equal(a, b):
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@backends
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (2, 0, 64), (0, 5, 64)])
@pytest.mark.parametrize("fmt", [fp8((4, 32)), FP4], ids=str)
def test_empty(shape, fmt, backend, device):
    width = shape[-1] // 2 if fmt.kind == "fp4" else shape[-1]
    codes = torch.zeros(*shape[:-1], width, dtype=torch.uint8, device=device)
    scale_shape = *shape[:-2], *fmt.scale_shape(shape[-2:])
    scales = torch.zeros(scale_shape, dtype=torch.uint8, device=device)
    operation = ops.fp4_to_bf16 if fmt.kind == "fp4" else ops.fp8_to_bf16
    values, flags = operation(codes, scales, fmt, backend=backend)
    assert values.shape == shape and flags.shape == shape[:-2] and not flags.any()


@backends
def test_wrong_operands_are_refused(backend, device):
    codes = torch.zeros(4, 64, dtype=torch.uint8, device=device)
    scales = torch.zeros(1, 2, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="decodes fp4, not fp8"):
        ops.fp4_to_bf16(codes, scales, fp8((4, 32)), backend=backend)
    with pytest.raises(ValueError, match="decodes fp8, not fp4"):
        ops.fp8_to_bf16(codes, scales, FP4, backend=backend)
    with pytest.raises(ValueError, match="expected"):
        ops.fp8_to_bf16(codes, scales, fp8((2, 32)), backend=backend)
    with pytest.raises(TypeError, match="one-byte"):
        ops.fp8_to_bf16(codes.int(), scales, fp8((4, 32)), backend=backend)
    with pytest.raises(TypeError, match="one-byte"):
        ops.fp8_to_bf16(codes, scales.bfloat16(), fp8((4, 32)), backend=backend)
