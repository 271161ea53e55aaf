"""sparse_attn against a loop in float64; definition and twin within the same bound."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4_quant.kernels import ops
from dsv4_quant.kernels.bounds_torch import attention_bound

BACKENDS = ("torch", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)


def oracle(q, kv, sink, indices, scale):
    """Per batch, position and head, one softmax over the listed keys and the sink, in float64.

    Returns the result and the bound on a computed one, which needs the magnitudes met on the way.
    """
    out = torch.zeros(q.shape, dtype=torch.float64)
    average, score, gap = torch.zeros_like(out), 0.0, 0.0
    for b, s, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = kv[b, [i for i in indices[b, s].tolist() if i >= 0]].double()
        logits = torch.cat((keys @ q[b, s, h].double() * scale, sink[h, None].double()))
        weights = logits.softmax(0)[:-1]
        out[b, s, h] = weights @ keys
        average[b, s, h] = weights @ keys.abs()
        finite = logits[logits.isfinite()]
        gap = max([gap, *(finite.max() - finite).tolist()])
        score = max([score, *(keys.abs() @ q[b, s, h].double().abs() * scale).tolist()])
    bound = attention_bound(average, score, min(gap, 104.0), q.shape[3], indices.shape[2], q.dtype)
    return out, bound


def problem(shape, listed, entries, dtype, device, seed=0):
    """Random q, kv, sink, indices (one fifth of them -1) and the usual scale."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(shape, generator=draw).to(device, dtype)
    kv = torch.randn(shape[0], entries, shape[3], generator=draw).to(device, dtype)
    sink = torch.randn(shape[2], generator=draw).to(device)
    indices = torch.randint(0, entries, (*shape[:2], listed), generator=draw, dtype=torch.int32)
    indices[torch.rand(indices.shape, generator=draw) < 0.2] = -1
    return q, kv, sink, indices.to(device), shape[3] ** -0.5


def cpu(operands):
    return tuple(part.cpu() if isinstance(part, torch.Tensor) else part for part in operands)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "listed", "entries"),
    [
        ((1, 3, 4, 64), 20, 30),
        ((2, 2, 17, 48), 33, 9),  # ragged heads, dimensions and steps; repeated entries
        ((1, 18, 1, 16), 5, 40),  # more positions than are gathered at a time
        ((1, 1, 2, 512), 130, 200),
    ],
    ids=str,
)
def test_within_the_bound(shape, listed, entries, dtype, backend, near, device):
    operands = problem(shape, listed, entries, dtype, device)
    found = ops.sparse_attn(*operands, backend=backend)
    assert found.dtype == dtype
    exact, bound = oracle(*cpu(operands))
    near(found, exact, bound)


@backends
def test_large_scores(backend, near, device):
    """Scores far apart, growing along the list: the running maximum moves at every step."""
    q, kv, sink, indices, scale = problem((1, 2, 3, 32), 64, 64, torch.float32, device)
    indices[:] = torch.arange(64, device=device)
    kv = kv * torch.linspace(0, 12, 64, device=device)[:, None]
    operands = (q, kv, sink * 20, indices, scale)
    near(ops.sparse_attn(*operands, backend=backend), *oracle(*cpu(operands)))


@backends
def test_one_key_and_the_sink_share_by_hand(backend, near, device):
    """Score 0 against sinks ln 1, ln 3 and -inf: shares 1/2, 1/4 and 1."""
    kv = torch.tensor([[[0.0, 4.0]]], device=device)
    q = torch.tensor([7.0, 0.0], device=device).expand(1, 1, 3, 2)
    sink = torch.tensor([0.0, math.log(3), -math.inf], device=device)
    indices = torch.tensor([[[-1, 0, -1]]], device=device)
    found = ops.sparse_attn(q, kv, sink, indices, 1.0, backend=backend)
    expected = torch.tensor([[[[0.0, 2.0], [0.0, 1.0], [0.0, 4.0]]]])
    near(found, expected, torch.full((1, 1, 3, 2), 1e-6, dtype=torch.float64))


@backends
def test_no_key_gives_zero(backend, same, device):
    q, kv, sink, indices, scale = problem((1, 3, 2, 16), 24, 20, torch.float32, device)
    indices[0, 1] = -1
    found = ops.sparse_attn(q, kv, sink, indices, scale, backend=backend)
    same(found[0, 1], torch.zeros(2, 16))
    for dtype in (torch.int32, torch.int64):
        none = torch.full((1, 3, 0), -1, device=device, dtype=dtype)
        same(ops.sparse_attn(q, kv, sink, none, scale, backend=backend), torch.zeros(1, 3, 2, 16))
    same(ops.sparse_attn(q, kv, sink, indices.long(), scale, backend=backend), found)


@backends
def test_an_entry_listed_twice_counts_twice(backend, near, device):
    q, kv, sink, _, scale = problem((1, 1, 2, 16), 1, 3, torch.float32, device)
    indices = torch.tensor([[[2, 0, 2, -1, 2]]], device=device)
    operands = (q, kv, sink, indices, scale)
    near(ops.sparse_attn(*operands, backend=backend), *oracle(*cpu(operands)))


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_reaches_who_uses_it(backend, bad, device):
    q, kv, sink, indices, scale = problem((1, 4, 3, 16), 6, 8, torch.float32, device)
    indices[:] = torch.arange(6, device=device)  # rows 6 and 7 are never listed
    clean = ops.sparse_attn(q, kv, sink, indices, scale, backend=backend)
    kv[0, 7], q[0, 1, 2], sink[0] = bad, bad, bad
    indices[0, 3, 0] = 7
    found = ops.sparse_attn(q, kv, sink, indices, scale, backend=backend)
    hit = torch.zeros(1, 4, 3, dtype=torch.bool, device=device)
    hit[0, 1, 2] = hit[0, :, 0] = hit[0, 3] = True
    assert found[hit].isnan().any(-1).all()
    assert torch.equal(found[~hit], clean[~hit])


@backends
def test_strides_and_empty(backend, same, device):
    q, kv, sink, indices, scale = problem((2, 3, 4, 16), 6, 8, torch.float32, device)
    found = ops.sparse_attn(q, kv, sink, indices, scale, backend=backend)
    turned = tuple(part.mT.contiguous().mT for part in (q, kv))
    spread = sink.repeat_interleave(2)[::2], indices.repeat_interleave(2, 1)[:, ::2]
    same(ops.sparse_attn(*turned, *spread, scale, backend=backend), found)
    for batch, positions in ((0, 3), (2, 0)):
        part = q[:batch, :positions], kv[:batch], sink, indices[:batch, :positions]
        empty = ops.sparse_attn(*part, scale, backend=backend)
        assert empty.shape == (batch, positions, 4, 16)


@backends
def test_wrong_operands_are_refused(backend, device):
    q, kv, sink, indices, scale = problem((1, 3, 4, 16), 6, 8, torch.float32, device)
    for error, match, operands in [
        (TypeError, "like q", (q, kv.bfloat16(), sink, indices)),
        (TypeError, "sink float32", (q, kv, sink.bfloat16(), indices)),
        (TypeError, "int32 or int64", (q, kv, sink, indices.float())),
        (TypeError, "float32 or bfloat16", (q.half(), kv.half(), sink, indices)),
        (ValueError, "do not fit", (q, kv[..., :8], sink, indices)),
        (ValueError, "do not fit", (q, kv, sink[:3], indices)),
        (ValueError, "do not fit", (q, kv, sink, indices[:, :2])),
        (ValueError, "do not fit", (q[0], kv, sink, indices)),
    ]:
        with pytest.raises(error, match=match):
            ops.sparse_attn(*operands, scale, backend=backend)


def test_indices_out_of_range(same, device):
    """An error in the definition; no key for the twin, which must not read beyond kv."""
    q, kv, sink, indices, scale = problem((1, 3, 4, 16), 6, 8, torch.float32, device)
    for wrong in (8, -2):
        indices[0, 1, 2] = wrong
        with pytest.raises(IndexError, match="between -1 and 7"):
            ops.sparse_attn(q, kv, sink, indices, scale, backend="torch")
        found = ops.sparse_attn(q, kv, sink, indices, scale, backend="triton")
        indices[0, 1, 2] = -1
        same(found, ops.sparse_attn(q, kv, sink, indices, scale, backend="triton"))


def test_definition_bits_at_the_published_head_size(same, threads, device):
    """64 heads of 512, window and top-k: equal bits for 1 and 2 threads (seen, not promised)."""
    operands = problem((1, 5, 64, 512), 640, 700, torch.float32, device)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(ops.sparse_attn(*operands, backend="torch"))
    same(*results)
