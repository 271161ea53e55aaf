"""hc_split_sinkhorn against the formula in float64; definition and twin within the same bound."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4_quant.kernels import ops
from dsv4_quant.kernels.bounds_torch import sigmoid_bound, sinkhorn_bound

BACKENDS = ("torch", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)


def problem(leading, hc, device, spread=1.0, seed=0):
    """Random mixes, scale and base."""
    draw = torch.Generator().manual_seed(seed)
    width = (2 + hc) * hc
    shapes = (*leading, width), (3,), (width,)
    return tuple((spread * torch.randn(s, generator=draw)).to(device) for s in shapes)


def oracle(mixes, scale, base, hc, iters, eps):
    """The three results and their bounds, in float64."""
    mixes, scale, base = (part.double().cpu() for part in (mixes, scale, base))
    parts = [slice(hc), slice(hc, 2 * hc), slice(2 * hc, None)]
    logits = [mixes[..., p] * s + base[p] for p, s in zip(parts, scale, strict=True)]
    sizes = [(mixes[..., p] * s).abs() + base[p].abs() for p, s in zip(parts, scale, strict=True)]
    largest = [size.max().item() if size.numel() else 0.0 for size in sizes]
    pre, post = logits[0].sigmoid() + eps, 2 * logits[1].sigmoid()
    comb = logits[2].unflatten(-1, (hc, hc)).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    bounds = sigmoid_bound(pre, largest[0]), sigmoid_bound(post, largest[1])
    return (pre, post, comb), (*bounds, sinkhorn_bound(comb, largest[2], iters))


@backends
@pytest.mark.parametrize(
    ("hc", "iters"), [(4, 1), (4, 2), (4, 20), (3, 3), (2, 20), (1, 2), (5, 2)]
)
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_within_the_bound(hc, iters, spread, backend, near, device):
    operands = problem((2, 9), hc, device, spread)
    found = ops.hc_split_sinkhorn(*operands, hc, iters, 1e-6, backend=backend)
    for part, exact, bound in zip(found, *oracle(*operands, hc, iters, 1e-6), strict=True):
        assert part.dtype == torch.float32
        near(part, exact, bound)


@backends
def test_the_published_setting_is_nearly_doubly_stochastic(backend, device):
    pre, post, comb = ops.hc_split_sinkhorn(*problem((300,), 4, device), backend=backend)
    assert pre.shape == post.shape == (300, 4) and comb.shape == (300, 4, 4)
    assert ((pre > 0) & (pre < 1.00001)).all() and ((post > 0) & (post < 2)).all()
    # the last step divides columns by their sum plus 1e-6; 8 roundings of 2**-23 at most follow
    assert ((comb.sum(-2) - 1).abs() < 1e-6 + 8 * 2.0**-23).all()
    assert ((comb.sum(-1) - 1).abs() < 0.05).all()


@backends
def test_by_hand(backend, near, device):
    """Zero logits and eps 0: sigmoid 1/2, and every stream mixed alike."""
    zeros = torch.zeros(1, 24, device=device), torch.ones(3, device=device)
    pre, post, comb = ops.hc_split_sinkhorn(*zeros, zeros[0][0], eps=0.0, backend=backend)
    tiny = torch.full((1, 4), 2.0**-20, dtype=torch.float64)
    near(pre, torch.full((1, 4), 0.5), tiny)
    near(post, torch.full((1, 4), 1.0), tiny)
    near(comb, torch.full((1, 4, 4), 0.25), tiny[..., None].expand(1, 4, 4))


@backends
@pytest.mark.parametrize("hc", [3, 4])
def test_eps_zero_with_unused_lanes(hc, backend, near, device):
    operands = problem((7,), hc, device)
    found = ops.hc_split_sinkhorn(*operands, hc, 3, 0.0, backend=backend)
    for part, exact, bound in zip(found, *oracle(*operands, hc, 3, 0.0), strict=True):
        near(part, exact, bound)


@backends
def test_saturated_and_not_finite(backend, device):
    """Sigmoids end in 0 and 1 without a NaN; a NaN or infinity stays within its token."""
    mixes, scale, base = problem((4,), 4, device)
    mixes[1] = torch.tensor([300.0, -300.0] * 12)
    mixes[2, :] = math.nan
    mixes[3, 8] = math.inf
    pre, post, comb = ops.hc_split_sinkhorn(mixes, scale.abs() + 1, base, backend=backend)
    assert pre[1].isfinite().all() and post[1].isfinite().all() and comb[1].isfinite().all()
    assert (pre[1, ::2] == 1 + 1e-6).all() and (post[1, 1::2] < 1e-30).all()
    assert pre[2].isnan().all() and post[2].isnan().all() and comb[2].isnan().all()
    assert comb[3].isnan().any() and pre[3].isfinite().all()
    clean = ops.hc_split_sinkhorn(mixes[:1], scale.abs() + 1, base, backend=backend)
    assert torch.equal(comb[:1], clean[2])


@backends
def test_strides_and_empty(backend, same, device):
    mixes, scale, base = problem((5, 3), 4, device)
    found = ops.hc_split_sinkhorn(mixes, scale, base, backend=backend)
    turned = mixes.transpose(0, 2).contiguous().transpose(0, 2)
    wide = (part.repeat_interleave(2)[::2] for part in (scale, base))
    for part, expected in zip(
        ops.hc_split_sinkhorn(turned, *wide, backend=backend), found, strict=True
    ):
        same(part, expected)
    shapes = [part.shape for part in ops.hc_split_sinkhorn(mixes[:0], scale, base, backend=backend)]
    assert shapes == [(0, 3, 4), (0, 3, 4), (0, 3, 4, 4)]


@backends
def test_wrong_operands_are_refused(backend, device):
    mixes, scale, base = problem((5,), 4, device)
    for error, match, arguments in [
        (TypeError, "are float32", (mixes.bfloat16(), scale, base)),
        (ValueError, "3 streams take", (mixes, scale, base, 3)),
        (ValueError, "4 streams take", (mixes, scale[:2], base)),
        (ValueError, "4 streams take", (mixes, scale, base[:3])),
        (ValueError, "at least one", (mixes, scale, base, 4, 0)),
    ]:
        with pytest.raises(error, match=match):
            ops.hc_split_sinkhorn(*arguments, backend=backend)


def test_definition_bits_depend_on_neither_threads_nor_batch(same, threads, device):
    operands = problem((9001,), 4, device)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(ops.hc_split_sinkhorn(*operands, backend="torch"))
    alone = ops.hc_split_sinkhorn(operands[0][77:78], *operands[1:], backend="torch")
    for one, two, row in zip(*results, alone, strict=True):
        same(one, two)
        same(row, one[77:78])
