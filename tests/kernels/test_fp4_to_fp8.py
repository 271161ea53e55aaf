"""fp4_to_fp8 against ml_dtypes and against the CPU cast: every gap x every code, every verdict."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_quant.formats import e2m1
from dsv4_quant.formats.blocks import BF16, FP4, Format, fp8
from dsv4_quant.kernels import fp4_to_fp8_numba, ops, verdicts

BACKENDS = ("torch", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)
FP4_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
FP4_VALUES[8] = 0.0  # the published table has no -0


def cast(packed, scales, target, backend, group=32):
    """The operation on numpy arrays."""
    operands = torch.from_numpy(packed), torch.from_numpy(scales)
    if torch.cuda.is_available():
        operands = operands[0].cuda(), operands[1].cuda()
    fmt = Format("fp4", (1, group), "e8m0")
    return ops.fp4_to_fp8(*operands, fmt, target, backend=backend)


def check_against_cpu(packed, scales, block, backend, group=32):
    """One matrix; all that the numba cast answers follows from what the operation does."""
    found = cast(packed, scales, fp8(block), backend, group)
    codes, tiles, verdict, low, high, top = (part.cpu().numpy() for part in found)
    out, out_scales = np.empty_like(codes), np.empty_like(tiles)
    spreads, result = np.zeros(256, np.int64), np.full(5, -1)
    fp4_to_fp8_numba.fp8_scales(scales, group, *block, out_scales)
    status = fp4_to_fp8_numba.fp4_to_fp8(
        packed, scales, out_scales, group, *block, out, spreads, result
    )
    np.testing.assert_array_equal(tiles, out_scales)
    np.testing.assert_array_equal(codes, out)
    spread = np.maximum(high.astype(int) - low, 0)
    np.testing.assert_array_equal(np.bincount(spread.ravel(), minlength=256), spreads)
    bad = np.argwhere(verdict != verdicts.EXACT)
    assert bool(status) == bool(len(bad))
    if status:
        i, j = bad[0]
        assert result.tolist() == [i, j, verdict[i, j], low[i, j], top[i, j]]
    return found


def test_verdicts_are_the_cpu_s():
    for name in ("EXACT", "SPREAD", "UNDERFLOW", "NAN_SCALE"):
        assert getattr(verdicts, name) == getattr(fp4_to_fp8_numba, name)


@backends
@pytest.mark.parametrize("top", [0, 1, 5, 6, 7, 11, 12, 13, 20, 127, 254])
def test_every_gap_and_code(top, backend):
    """One tile: a row for every gap, whose first block has the tile's largest scale."""
    gaps = np.arange(top + 1)
    codes = np.tile(np.arange(16, dtype=np.uint8), (len(gaps), 4))
    scales = np.stack([np.full_like(gaps, top), top - gaps], 1).astype(np.uint8)
    found = check_against_cpu(e2m1.pack(codes), scales, (len(gaps), 64), backend)
    S = max(top - 6, 0)
    values = np.ldexp(FP4_VALUES[codes], scales.repeat(32, 1).astype(int) - S)
    expected = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(found.codes.cpu().numpy(), expected)
    assert (found.scales.item(), found.top.item()) == (S, top)
    assert (found.low.item(), found.high.item()) == (0, top)


LAST_EXACT = {1: 14, 2: 15, 3: 14, 4: 16, 5: 15, 6: 17, 7: 16}  # code -> gap


@backends
def test_every_verdict(backend):
    """Each code alone beside a 6: the largest gap that it survives, and one more."""
    codes, scales, expected = [], [], []
    for code in range(16):
        for beyond in (0, 1) if code & 7 else (100,):
            codes.append([7] + [0] * 62 + [code])
            scales.append([120, 120 - LAST_EXACT.get(code & 7, 0) - beyond])
            expected.append(verdicts.SPREAD if beyond == 1 else verdicts.EXACT)
    codes, scales = np.array(codes, np.uint8), np.array(scales, np.uint8)
    found = check_against_cpu(e2m1.pack(codes), scales, (1, 64), backend)
    assert found.verdicts.flatten().tolist() == expected


@backends
def test_scales_at_both_ends(backend):
    """Rows are tiles: a scale below 2**-127 is UNDERFLOW unless all is zero; 0xFF spoils a tile."""
    tops = [0, 5, 6, 254, 255, 5, 255]
    codes = np.full((len(tops), 64), 0x9, np.uint8)
    codes[5:] = 0
    codes[0, :32] = 0x8
    scales = np.array([[top, min(top, 120)] for top in tops], np.uint8)
    found = check_against_cpu(e2m1.pack(codes), scales, (1, 64), backend)
    V = verdicts
    assert found.verdicts.flatten().tolist() == [
        V.UNDERFLOW, V.UNDERFLOW, V.EXACT, V.SPREAD, V.NAN_SCALE, V.EXACT, V.NAN_SCALE
    ]  # fmt: skip
    assert found.scales.flatten().tolist() == [0, 0, 0, 248, 255, 0, 255]
    out = found.codes.cpu().numpy()
    assert (out[[4, 6]] == 0x7F).all() and not out[5].any() and not out[0, :32].any()


@st.composite
def matrices(draw):
    group = draw(st.sampled_from([32, 64, 96]))
    block = draw(st.sampled_from([3, 32])), group * draw(st.integers(1, 3))
    rows, groups = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    packed = rng.integers(0, 256, (rows, groups * group // 2), np.uint8)
    packed[:, : group // 2] *= rng.random((rows, 1)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    middle, spread = draw(st.integers(0, 254)), draw(st.sampled_from([0, 3, 11, 14, 15, 30]))
    scales = rng.integers(middle - spread, middle + 1, (rows, groups)).clip(0, 254).astype(np.uint8)
    if draw(st.integers(0, 9)) == 0:
        scales[rng.integers(rows), rng.integers(groups)] = 255
    return packed, scales, block, group


@pytest.mark.parametrize(("backend", "examples"), [("torch", 60), ("triton", 15)])
def test_any_geometry(backend, examples):
    @settings(deadline=None, max_examples=examples)
    @given(matrices())
    def agree(matrix):
        packed, scales, block, group = matrix
        check_against_cpu(packed, scales, block, backend, group)

    agree()


@backends
def test_stacks_strides_and_byte_types(backend, device):
    """A layer's experts in one call are each expert alone; so is any view of the same bytes."""
    draw = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (2, 2, 6, 64), generator=draw, dtype=torch.uint8).to(device)
    scales = torch.randint(88, 106, (2, 2, 6, 4), generator=draw, dtype=torch.uint8).to(device)
    target = fp8((4, 128))
    whole = ops.fp4_to_fp8(packed, scales, FP4, target, backend=backend)
    assert {verdicts.EXACT, verdicts.SPREAD} == set(whole.verdicts.flatten().tolist())
    for index in [(0, 0), (1, 0)]:
        alone = ops.fp4_to_fp8(packed[index], scales[index], FP4, target, backend=backend)
        assert all(torch.equal(a[index], b) for a, b in zip(whole, alone, strict=True))
    views = packed.transpose(0, 1).view(torch.int8), scales.transpose(0, 1)
    swapped = ops.fp4_to_fp8(*views, FP4, target, backend=backend)
    assert all(torch.equal(a.transpose(0, 1), b) for a, b in zip(whole, swapped, strict=True))
    assert all(part.dtype == torch.uint8 and part.is_contiguous() for part in swapped)


@backends
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (2, 0, 64), (0, 5, 64)])
def test_empty(shape, backend, device):
    packed = torch.zeros(*shape[:-1], shape[-1] // 2, dtype=torch.uint8, device=device)
    scales = torch.zeros(*shape[:-1], shape[-1] // 32, dtype=torch.uint8, device=device)
    found = ops.fp4_to_fp8(packed, scales, FP4, fp8((4, 32)), backend=backend)
    assert found.codes.shape == shape
    tiles = (*shape[:-2], -(-shape[-2] // 4), shape[-1] // 32)
    assert all(part.shape == tiles for part in found[1:])


@backends
def test_wrong_operands_are_refused(backend, device):
    packed = torch.zeros(4, 32, dtype=torch.uint8, device=device)
    scales = torch.zeros(4, 2, dtype=torch.uint8, device=device)
    for error, match, operands in [
        (ValueError, "do not fit tiles of fp8 4x48", (packed, scales, FP4, fp8((4, 48)))),
        (ValueError, "64 columns", (packed, scales, Format("fp4", (1, 48), "e8m0"))),
        (ValueError, "do not fit", (packed, scales[::2], Format("fp4", (2, 32), "e8m0"))),
        (ValueError, "casts fp4 to fp8", (packed, scales, FP4, fp8((4, 32), "f32"))),
        (ValueError, "casts fp4 to fp8", (packed, scales, BF16)),
        (ValueError, "expected", (packed, scales[:2])),
        (TypeError, "one-byte", (packed.int(), scales)),
        (TypeError, "one-byte", (packed, scales.float())),
    ]:
        with pytest.raises(error, match=match):
            ops.fp4_to_fp8(*operands, backend=backend)
