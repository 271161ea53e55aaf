"""hadamard against its matrix, and twin against definition bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_quant.kernels import ops
from dsv4_quant.kernels.bounds_torch import sum_error

BACKENDS = ("torch", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)


def matrix(size):
    """H[i, j] = (-1)**popcount(i & j)."""
    both = np.arange(size)[:, None] & np.arange(size)
    return 1 - 2 * (np.bitwise_count(both) % 2).astype(np.float64)


@backends
@pytest.mark.parametrize("size", [1, 2, 4, 16, 64, 128, 512])
def test_small_integers_are_exact_but_for_the_factor(size, backend, same, device):
    draw = np.random.default_rng(size)
    x = draw.integers(-100, 101, (5, size)).astype(np.float32)
    expected = (x @ matrix(size)).astype(np.float32) * np.float32(size**-0.5)
    found = ops.hadamard(torch.from_numpy(x).to(device), backend=backend)
    same(found, torch.from_numpy(expected))


@backends
def test_one_unit_vector_per_row_gives_the_matrix(backend, same, device):
    eye = torch.eye(64, device=device)
    same(ops.hadamard(eye, backend=backend), torch.from_numpy(matrix(64) / 8).float())


@backends
def test_close_to_the_product_in_float64(backend, near, device):
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ torch.from_numpy(matrix(128)) * 128**-0.5
    # a butterfly is a sum of 128 terms in some order, then one product
    bound = x.double().abs().sum(-1, keepdim=True).expand_as(exact) * 128**-0.5 * sum_error(129)
    near(ops.hadamard(x.to(device), backend=backend), exact, bound)


@backends
def test_twice_is_the_identity_on_powers_of_four(backend, same, device):
    """The factor of 64 is 1/8: nothing is rounded for small integers."""
    x = torch.arange(-64, 64, device=device, dtype=torch.float32).view(2, 64)
    once = ops.hadamard(x, backend=backend)
    same(ops.hadamard(once, backend=backend), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 128), (2, 3, 5, 16), (300, 1), (64,)])
def test_twins_agree(shape, dtype, same, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = (x * 2.0 ** torch.arange(x.numel()).remainder(40).view(shape)).to(device, dtype)
    found = ops.hadamard(x, backend="triton")
    assert found.dtype == dtype
    same(found, ops.hadamard(x, backend="torch"))
    same(ops.hadamard(x.mT.mT if x.dim() > 1 else x, backend="triton"), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twins_agree_on_any_bits(dtype, same, device):
    wide = torch.int16 if dtype == torch.bfloat16 else torch.int32
    limits = torch.iinfo(wide)

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.integers(limits.min, limits.max), min_size=16, max_size=16))
    def agree(bits):
        x = torch.tensor(bits, dtype=wide, device=device).view(dtype)
        same(ops.hadamard(x, backend="triton"), ops.hadamard(x, backend="torch"))

    agree()


@backends
def test_strides_and_empty(backend, same, device):
    x = torch.randn(16, 9, 8, generator=torch.Generator().manual_seed(2)).to(device)
    for view in (x.transpose(0, 2), x[:, ::2, :4], x[:, :1].expand(16, 5, 8)):
        same(ops.hadamard(view, backend=backend), ops.hadamard(view.contiguous(), backend=backend))
    assert ops.hadamard(x[:0], backend=backend).shape == (0, 9, 8)


@backends
def test_wrong_operands_are_refused(backend, device):
    for size in (0, 3, 96):
        with pytest.raises(ValueError, match="2\\*\\*n rows"):
            ops.hadamard(torch.zeros(2, size, device=device), backend=backend)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        ops.hadamard(torch.zeros(2, 4, dtype=torch.float16, device=device), backend=backend)


def test_definition_bits_do_not_depend_on_threads(same, threads, device):
    x = torch.randn(701, 128, generator=torch.Generator().manual_seed(3)).to(device)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(ops.hadamard(x, backend="torch"))
    same(*results)
