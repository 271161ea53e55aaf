"""sparse_attn, the twin: one pass over the keys with a running maximum, nothing gathered in memory.

Within ``bounds_torch.attention_bound`` of the definition: the sums have another order, and powers
that are rounded to bfloat16 are rounded relative to the maximum so far, not to the final one.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_quant.kernels.launch_triton import DOT_MIN, OPTIONS
from dsv4_quant.kernels.minifloat_triton import round_to, widen
from dsv4_quant.kernels.sparse_attn_torch import check_attention

KEYS = 16
"""Keys per step: with 512 dimensions in float32, 32 KiB of shared memory a stage."""

ROUND = 8
"""The number of steps is a constant of the compiled kernel; a multiple of this, so that lists of
any length need few kernels. What lies beyond the list is masked."""


@triton.jit
def _sparse_attn_kernel(
    q_ptr,
    kv_ptr,
    sink_ptr,
    indices_ptr,
    out_ptr,
    positions,
    heads,
    entries,
    listed,
    softmax_scale,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program: HEADS heads at one position. DIM is SIZE rounded up to a power of two.
    place = tl.program_id(0).to(tl.int64)
    first_row = place // positions * entries
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, DIM)
    at = (place * heads + head)[:, None] * SIZE + dim[None, :]
    inside = (head < heads)[:, None] & (dim < SIZE)[None, :]
    q = widen(tl.load(q_ptr + at, inside, other=0.0))  # [HEADS, DIM]
    # The sink is the first column of the softmax: its power opens the sum, its value is nothing.
    top = tl.load(sink_ptr + head, head < heads, other=0.0)
    total = tl.where(top == float("-inf"), 0.0, tl.exp(top - top))
    acc = tl.zeros((HEADS, DIM), tl.float32)
    for step in range(STEPS):
        entry = step * KEYS + tl.arange(0, KEYS)
        index = tl.load(indices_ptr + place * listed + entry, entry < listed, other=-1)
        present = (index >= 0) & (index < entries)
        row_at = (first_row + index)[:, None] * SIZE + dim[None, :]
        wanted = present[:, None] & (dim < SIZE)[None, :]
        rows = widen(tl.load(kv_ptr + row_at, wanted, other=0.0))  # [KEYS, DIM]
        # torch: scores = (q @ rows.mT * softmax_scale).masked_fill(absent, -inf)
        scores = tl.dot(q, tl.trans(rows), input_precision=PRECISION) * softmax_scale
        scores = tl.where(present[None, :], scores, float("-inf"))
        # torch: powers = (logits - logits.amax(-1)).exp()
        # With the maximum so far; what was summed before shrinks when it grows. -inf as a maximum
        # (no sink and no key yet) stands for an empty sum.
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        powers = tl.exp(scores - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(powers, 1)
        # torch: powers.to(kv.dtype).float() @ rows
        weights = widen(round_to(powers, kv_ptr.dtype.element_ty))
        acc = acc * shrink[:, None] + tl.dot(weights, rows, input_precision=PRECISION)
        top = new_top
    out = round_to(acc / total[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, inside)


def sparse_attn(
    q: Tensor, kv: Tensor, attn_sink: Tensor, indices: Tensor, softmax_scale: float
) -> Tensor:
    """See the definition, ``sparse_attn_torch.sparse_attn``."""
    check_attention(q, kv, attn_sink, indices)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        batch, positions, heads, size = q.shape
        _sparse_attn_kernel[(batch * positions, triton.cdiv(heads, DOT_MIN))](
            q.contiguous(),
            kv.contiguous(),
            attn_sink.contiguous(),
            indices.contiguous(),
            out,
            positions,
            heads,
            kv.shape[1],
            indices.shape[2],
            softmax_scale,
            SIZE=size,
            DIM=max(DOT_MIN, triton.next_power_of_2(size)),
            HEADS=DOT_MIN,
            KEYS=KEYS,
            STEPS=triton.cdiv(indices.shape[2], KEYS * ROUND) * ROUND,
            # TF32 holds every bfloat16 exactly (11 significant bits against 8), so for bfloat16
            # the tensor cores' products lose nothing; float32 must not go through them.
            PRECISION="tf32" if q.dtype == torch.bfloat16 else "ieee",
            **OPTIONS,
        )
    return out
