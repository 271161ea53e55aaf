"""Block formats: decoded values against torch's arithmetic, for every code under every scale."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_quant.formats.blocks import BF16, F32, FP4, I64, Format, Tensor, fp8

ALL_BYTES = np.arange(256, dtype=np.uint8)


def fp8_by_torch(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Value by value: row r and column c take the scale of block (r // b, c // k)."""
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    if scales.dtype == np.uint8:
        scale = torch.from_numpy(scales).view(torch.float8_e8m0fnu).float()
    else:
        scale = torch.from_numpy(scales)
    rows = torch.arange(codes.shape[0]) // block[0]
    cols = torch.arange(codes.shape[1]) // block[1]
    return (values * scale[rows][:, cols]).numpy()


def fp4_by_ml_dtypes(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    with np.errstate(over="ignore"):
        return values * powers[:, np.arange(values.shape[1]) // 32]


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal bits, but for the payload of NaN, which the arithmetic may choose."""
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == theirs.shape
    nan = np.isnan(theirs)
    return np.array_equal(np.isnan(ours), nan) and ours[~nan].tobytes() == theirs[~nan].tobytes()


def test_every_fp4_code_under_every_scale_byte() -> None:
    packed = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, np.uint8),
                     (256, 1))  # fmt: skip
    tensor = Tensor(FP4, (256, 32), packed, ALL_BYTES.reshape(256, 1))
    theirs = fp4_by_ml_dtypes(tensor.codes, tensor.scales)
    assert same(tensor.decode(), theirs)
    assert np.array_equal(tensor.decode()[127, :16], [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1,
                                                      -1.5, -2, -3, -4, -6])  # fmt: skip


@pytest.mark.parametrize("scale", ["e8m0", "f32"])
def test_every_fp8_code_under_every_scale_byte(scale: str) -> None:
    codes = np.tile(ALL_BYTES, (256, 1))
    scales = ALL_BYTES.reshape(256, 1)
    if scale == "f32":
        scales = np.float32(2.0) ** (np.arange(256, dtype=np.float32).reshape(256, 1) - 128)
    tensor = Tensor(fp8((1, 256), scale), (256, 256), codes, scales)
    assert same(tensor.decode(), fp8_by_torch(codes, scales, (1, 256)))


def test_a_product_beyond_float32_is_infinite_and_no_warning() -> None:
    tensor = Tensor(fp8((1, 1)), (1, 1), np.array([[0x7E]], np.uint8), np.array([[254]], np.uint8))
    assert np.isposinf(tensor.decode()).all()


def test_an_infinite_scale_makes_nan_of_zero_and_no_warning() -> None:
    codes, scales = np.array([[0, 0x38]], np.uint8), np.array([[np.inf]], np.float32)
    values = Tensor(fp8((1, 2), "f32"), (1, 2), codes, scales).decode()
    assert np.isnan(values[0, 0]) and np.isposinf(values[0, 1])


def test_the_smallest_products_are_exact_subnormals() -> None:
    tensor = Tensor(fp8((1, 1)), (1, 1), np.array([[1]], np.uint8), np.array([[0]], np.uint8))
    assert tensor.decode()[0, 0] == np.float32(2.0**-136)  # 2**-9 * 2**-127
    tensor = Tensor(FP4, (1, 2), np.array([[0x91]], np.uint8), np.array([[0]], np.uint8))
    assert tensor.decode().tolist() == [[2.0**-128, -(2.0**-128)]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 70),
    block=st.sampled_from([(32, 32), (16, 32), (1, 32), (7, 5), (128, 128), (70, 1)]),
    scale=st.sampled_from(["e8m0", "f32"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_fp8_blocks_of_any_size_and_ragged_edges(
    rows: int, cols: int, block: tuple[int, int], scale: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    form = fp8(block, scale)
    grid = form.scale_shape((rows, cols))
    assert grid == (int(np.ceil(rows / block[0])), int(np.ceil(cols / block[1])))
    codes = rng.integers(0, 256, (rows, cols), np.uint8)
    exponents = rng.integers(100, 150, grid, np.uint8)
    scales = exponents if scale == "e8m0" else rng.uniform(1e-3, 1, grid).astype(np.float32)
    tensor = Tensor(form, (rows, cols), codes, scales)
    assert same(tensor.decode(), fp8_by_torch(codes, scales, block))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 20), half=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_fp4_rows_and_ragged_last_block(rows: int, half: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, 2 * half)
    packed = rng.integers(0, 256, (rows, half), np.uint8)
    scales = rng.integers(110, 140, FP4.scale_shape(shape), np.uint8)
    tensor = Tensor(FP4, shape, packed, scales)
    assert tensor.decode().shape == shape
    assert same(tensor.decode(), fp4_by_ml_dtypes(packed, scales))


def test_one_scale_rules_its_block_and_no_other() -> None:
    codes = np.full((64, 64), 0x38, np.uint8)  # 1.0
    scales = np.array([[127, 128], [129, 255]], np.uint8)
    values = Tensor(fp8((32, 32)), (64, 64), codes, scales).decode()
    assert (values[:32, :32] == 1).all() and (values[:32, 32:] == 2).all()
    assert (values[32:, :32] == 4).all() and np.isnan(values[32:, 32:]).all()


def test_unquantised_kinds() -> None:
    bits = np.array([[0x3F80, 0xC000]], np.uint16)
    assert Tensor(BF16, (1, 2), bits).decode().tolist() == [[1.0, -2.0]]
    floats = np.array([1.5, np.nan], np.float32)
    assert Tensor(F32, (2,), floats).decode().tobytes() == floats.tobytes()
    with pytest.raises(TypeError, match="integer"):
        Tensor(I64, (1,), np.array([1])).decode()


def test_formats_are_values() -> None:
    assert str(FP4) == "fp4 1x32 e8m0" and str(fp8((128, 128), "f32")) == "fp8 128x128 f32"
    assert str(BF16) == "bf16" and not BF16.is_quantised and FP4.is_quantised
    assert fp8((32, 32)) == Format("fp8", (32, 32), "e8m0") != fp8((32, 32), "f32")
    assert len({FP4, Format("fp4", (1, 32), "e8m0")}) == 1
    with pytest.raises(FrozenInstanceError):
        FP4.kind = "fp8"  # type: ignore[misc]


def test_nbytes_counts_codes_and_scales() -> None:
    tensor = Tensor(FP4, (4, 64), np.zeros((4, 32), np.uint8), np.zeros((4, 2), np.uint8))
    assert tensor.nbytes == 4 * 32 + 4 * 2
    assert Tensor(BF16, (4, 64), np.zeros((4, 64), np.uint16)).nbytes == 512
