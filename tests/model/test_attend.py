"""The attention against the sparse_attn kernel, which lists its keys instead of masking them."""

from __future__ import annotations

import pytest
import torch

from dsv4_quant.kernels.ops import sparse_attn
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.attend import attend, window_start
from dsv4_quant.model.linear import Workers


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 70), (37, 1), (100, 45)])
@pytest.mark.parametrize("window", [1, 16, 24])
def test_the_kernel_agrees(start: int, count: int, window: int) -> None:
    generator = torch.Generator().manual_seed(start + count)
    heads, width, stop = 3, 40, start + count
    entries = stop // 4
    q = torch.randn(count, heads, width, generator=generator)
    kv = torch.randn(stop + entries, width, generator=generator)
    sink = torch.randn(heads, generator=generator)
    seen = torch.rand(count, entries, generator=generator) < 0.5
    listed = [
        [key if start + i - window < key <= start + i else -1 for key in range(stop)]
        + [stop + e if seen[i, e] else -1 for e in range(entries)]
        for i in range(count)
    ]
    expected = sparse_attn(q[None], kv[None], sink, torch.tensor([listed]), width**-0.5)[0]
    keys = kv[window_start(start, window) : stop]
    with Workers(2) as workers:
        a = Arithmetic(deployed=False, bfloat16=False, products=workers)
        found = attend(q, keys, kv[stop:], seen, sink, start=start, window=window, a=a)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_large_sink_takes_everything() -> None:
    with Workers(1) as workers:
        a = Arithmetic(deployed=False, bfloat16=False, products=workers)
        ones = torch.ones(1, 2, 16)
        found = attend(
            ones, ones[0, :1], torch.empty(0, 16), torch.empty(1, 0).bool(),
            torch.tensor([500.0, -500.0]), start=0, window=4, a=a,
        )  # fmt: skip
    assert found[0, 0].tolist() == [0.0] * 16 and found[0, 1].tolist() == [1.0] * 16
