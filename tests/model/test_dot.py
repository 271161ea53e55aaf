"""The order of every sum, and that nothing but the two operands decides about a value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e4m3
from dsv4_quant.formats.blocks import BF16, CODES, F32, FP4, I64, Format, Tensor, fp8
from dsv4_quant.model.linear import Workers, as_weight, dot_rows
from dsv4_quant.model.panels import decode_panel

Floats = NDArray[np.float32]

BLOCKED = 1024
FORMATS = [FP4, fp8((128, 128)), fp8((32, 32)), fp8((128, 128), "f32"), fp8((128, 64)), BF16, F32]


def in_order(x: Floats, w: Floats, block: int = BLOCKED) -> np.float32:
    """The definition in the docstring of ``dot``, in plain numpy.

    The fused multiply-add is done in float64: exact, because the operands have 8 bits.
    """
    total = np.float32(0)
    for start in range(0, len(x), block):
        lanes = np.zeros(16, np.float32)
        for k in range(start, min(start + block, len(x)), 16):
            a, b = np.zeros((2, 16))
            a[: len(x[k : k + 16])], b[: len(x[k : k + 16])] = x[k : k + 16], w[k : k + 16]
            lanes = (lanes + a * b).astype(np.float32)
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        total += lanes[0]
    return total


def few_bits(rng: np.random.Generator, *shape: int) -> Floats:
    """Integers of up to 8 bits times 2**-10 ... 2**0: sums do round in float32."""
    values = rng.integers(-127, 128, shape) * np.exp2(rng.integers(-10, 1, shape))
    return values.astype(np.float32)


@pytest.mark.parametrize("k", [1, 15, 16, 17, 100, 1024, 1040, 2500])
def test_the_order_of_a_sum(k: int) -> None:
    rng = np.random.default_rng(k)
    x, w = few_bits(rng, 5, k), few_bits(rng, 9, k)
    expected = np.array([[in_order(a, b) for b in w] for a in x])
    assert k < 100 or (expected != x @ w.T).any(), "numpy's order gives the same: test too weak"
    with Workers(1) as workers:
        weight = as_weight(torch.from_numpy(w))
        np.testing.assert_array_equal(workers.linear(torch.from_numpy(x), weight), expected)
        whole = workers.linear(torch.from_numpy(x), weight, block=None)
    np.testing.assert_array_equal(whole, [[in_order(a, b, 1 << 20) for b in w] for a in x])
    rows = dot_rows(torch.from_numpy(x), torch.from_numpy(w[:5]))
    np.testing.assert_array_equal(rows, np.diagonal(whole))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 7, 33), (130, 251, 300), (70, 500, 2048)])
def test_threads_and_batches_move_nothing(m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(m)
    x = torch.from_numpy(rng.standard_normal((m, k), np.float32))
    weight = as_weight(torch.from_numpy(rng.standard_normal((n, k), np.float32)))
    with Workers(1) as one, Workers(2) as two, Workers(5) as five:
        whole = one.linear(x, weight)
        assert (whole - x @ torch.from_numpy(weight.codes).T).abs().max() < 1e-3
        for workers in (two, five):
            assert torch.equal(workers.linear(x, weight), whole)
        for row in range(0, m, 17):
            assert torch.equal(two.linear(x[row], weight), whole[row])
            some = two.linear(x[row:], weight, rows=(n // 3, n))
            assert torch.equal(some, whole[row:, n // 3 :])


def test_no_values_at_all() -> None:
    with Workers(2) as workers:
        empty = workers.linear(torch.zeros(0, 16), as_weight(torch.ones(6, 16)))
    assert empty.shape == (0, 6)


def random_weight(form: Format, rows: int, cols: int) -> Tensor:
    """Every code occurs; scales from 2**-20 to 2**20."""
    rng = np.random.default_rng(rows)
    if form.kind == "bf16":
        codes = rng.integers(0x3000, 0x4800, (rows, cols), np.uint16)  # 2**-31 ... 2**17
        return Tensor(form, (rows, cols), codes | rng.integers(0, 2, codes.shape, np.uint16) << 15)
    if form.kind == "f32":
        return Tensor(form, (rows, cols), rng.standard_normal((rows, cols), np.float32))
    width = cols // 2 if form.kind == "fp4" else cols
    codes = rng.integers(0, 256, (rows, width), CODES[form.kind])
    if form.kind == "fp8":
        codes[np.isin(codes, e4m3.NAN_CODES)] = 0
    scales = rng.integers(107, 148, form.scale_shape((rows, cols)), np.uint8)
    if form.scale == "f32":
        return Tensor(form, (rows, cols), codes, scales.astype(np.float32) * np.float32(0.3))
    return Tensor(form, (rows, cols), codes, scales)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_panels_are_the_decoded_rows(form: Format) -> None:
    weight = random_weight(form, 300, 320)
    decoded = weight.decode()
    for start, stop in [(0, 300), (0, 1), (127, 129), (100, 290), (299, 300)]:
        panel = np.full((stop - start + 2, 320), np.float32(7))
        decode_panel(weight, start, stop, panel)
        assert panel[: stop - start].tobytes() == decoded[start:stop].tobytes()
        assert (panel[stop - start :] == 7).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_product_with_every_format(form: Format) -> None:
    weight = random_weight(form, 200, 96)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((11, 96), np.float32))
    plain = as_weight(torch.from_numpy(weight.decode()))
    with Workers(2) as workers:
        assert torch.equal(workers.linear(x, weight), workers.linear(x, plain))


def test_fp4_codes_one_by_one() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    weight = Tensor(FP4, (16, 32), codes, np.full((16, 1), 127, np.uint8))
    panel = np.empty((16, 32), np.float32)
    decode_panel(weight, 0, 16, panel)
    assert panel.tobytes() == e2m1.VALUES[e2m1.unpack(codes)].tobytes()


def test_tables_of_integers_are_no_weights() -> None:
    with pytest.raises(TypeError, match="i64"):
        decode_panel(Tensor(I64, (1, 1), np.zeros((1, 1), np.int64)), 0, 1, np.empty((1, 1), "f4"))
