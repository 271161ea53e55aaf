"""hc_split_sinkhorn, the twin: within ``bounds_torch.sinkhorn_bound`` of the definition."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.kernels.hc_split_sinkhorn_torch import check_mixes
from dsv4_quant.kernels.launch_triton import OPTIONS, tile_rows


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _hc_split_sinkhorn_kernel(
    mixes_ptr,
    scale_ptr,
    base_ptr,
    pre_ptr,
    post_ptr,
    comb_ptr,
    rows,
    eps,
    HC: tl.constexpr,
    ITERS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    # One program: ROWS tokens. LANES is HC rounded up to a power of two.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    mixes_at = mixes_ptr + row[:, None] * ((2 + HC) * HC) + lane[None, :]
    inside = (row < rows)[:, None] & (lane < HC)[None, :]
    at = row[:, None] * HC + lane[None, :]
    # torch: pre = sigmoid(pre * scale[0] + pre_base) + eps
    base = tl.load(base_ptr + lane, lane < HC, other=0.0)
    mixes = tl.load(mixes_at, inside, other=0.0)
    tl.store(pre_ptr + at, _sigmoid(mixes * tl.load(scale_ptr) + base[None, :]) + eps, inside)
    # torch: post = 2 * sigmoid(post * scale[1] + post_base)
    base = tl.load(base_ptr + HC + lane, lane < HC, other=0.0)
    mixes = tl.load(mixes_at + HC, inside, other=0.0)
    post = 2.0 * _sigmoid(mixes * tl.load(scale_ptr + 1) + base[None, :])
    tl.store(post_ptr + at, post, inside)

    # torch: logits = (comb * scale[2] + comb_base).unflatten(-1, (hc, hc))
    used = (lane < HC)[:, None] & (lane < HC)[None, :]  # [LANES, LANES]
    cell = lane[:, None] * HC + lane[None, :]
    base = tl.load(base_ptr + 2 * HC + cell, used, other=0.0)
    inside = (row < rows)[:, None, None] & used[None]
    mixes_at = row[:, None, None] * ((2 + HC) * HC) + 2 * HC + cell[None]
    mixes = tl.load(mixes_ptr + mixes_at, inside, other=0.0)
    logits = mixes * tl.load(scale_ptr + 2) + base[None]  # [ROWS, LANES, LANES]
    # torch: comb = logits.softmax(-1) + eps
    # Unused cells become 0 and stay 0: their sums are divided by something that is not 0.
    logits = tl.where((lane < HC)[None, None, :], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    comb = tl.where(used[None], powers / tl.sum(powers, 2)[:, :, None] + eps, 0.0)
    rest = tl.where(lane < HC, eps, 1.0)[None, :]
    # torch: comb = comb / (comb.sum(-2) + eps)
    comb = comb / (tl.sum(comb, 1) + rest)[:, None, :]
    for _ in range(ITERS - 1):
        # torch: comb = comb / (comb.sum(-1) + eps); comb = comb / (comb.sum(-2) + eps)
        comb = comb / (tl.sum(comb, 2) + rest)[:, :, None]
        comb = comb / (tl.sum(comb, 1) + rest)[:, None, :]
    tl.store(comb_ptr + row[:, None, None] * (HC * HC) + cell[None], comb, inside)


def hc_split_sinkhorn(
    mixes: Tensor, scale: Tensor, base: Tensor, hc: int = 4, iters: int = 20, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """See the definition, ``hc_split_sinkhorn_torch.hc_split_sinkhorn``."""
    check_mixes(mixes, scale, base, hc, iters)
    pre, post = (mixes.new_empty((*mixes.shape[:-1], hc)) for _ in range(2))
    comb = mixes.new_empty((*mixes.shape[:-1], hc, hc))
    if mixes.numel():
        rows = mixes.numel() // mixes.shape[-1]
        lanes = triton.next_power_of_2(hc)
        tile = tile_rows(rows, lanes * lanes)
        _hc_split_sinkhorn_kernel[(triton.cdiv(rows, tile),)](
            mixes.contiguous(),
            scale.contiguous(),
            base.contiguous(),
            pre,
            post,
            comb,
            rows,
            eps,
            HC=hc,
            ITERS=iters,
            ROWS=tile,
            LANES=lanes,
            **OPTIONS,
        )
    return pre, post, comb
