"""How far a twin may be from its definition where sums have no fixed order.

Every bound is derived here, once, from the errors of single operations; the tests take their
tolerances from here and from nowhere else. Notation: the computed value of an operation is the true
one times ``1 + d``.

EPS   |d| of a float32 sum or product: 2**-24 where it is rounded to nearest; tensor cores align the
      terms of a sum and cut them off, which costs up to 2**-23 of the largest.
FN    |d| of exp and of a division: 2**-21 covers every implementation in use (4 units in the last
      place; numpy's exp has 2.5, a GPU's division 2). A GPU's exp multiplies its argument by
      log2(e) in float32 first, so that a result exp(x) is off by up to FN * (1 + |x|).
TINY  what underflow can cost an operation, flushing included.

A sum of n terms in any order: every term takes part in at most n additions, so the error is below
``n * EPS / (1 - n * EPS)`` times the sum of magnitudes.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 2.0**-23
FN = 2.0**-21
TINY = 2.0**-126
BF16 = 2.0**-9
"""|d| of rounding to bfloat16."""


def sum_error(terms: int) -> float:
    """Error of a float32 sum of products, in units of its sum of magnitudes."""
    return terms * EPS / (1 - terms * EPS)


def gemm_bound(magnitude: Tensor, cols: int, step: int, dtype: torch.dtype) -> Tensor:
    """For fp8_gemm and fp4_gemm.

    The definition is exact but for its last rounding. In the twin the products of codes are exact
    (4 + 4 bits). A product takes part in at most ``step`` additions within its step; tensor cores
    cut off a few terms and the running sum at a time, which costs one more EPS for every few: less
    than ``2 * step``. Two products scale the step's sum (exact for powers of two), and it takes
    part in at most ``cols / step`` additions of steps. One rounding more is the definition's.
    Holds while no partial result leaves float32's range.

    Args:
        magnitude: ``|dequant(x)| @ |dequant(weight)|.T``, float64.
        cols: K.
        step: along K both scales are constant for so many values: gcd of group and block width.
        dtype: of the results.
    """
    error = magnitude * sum_error(2 * step + -(-cols // step) + 3) + 2 * cols * TINY
    return _and_rounding(error, magnitude, dtype)


def attention_bound(
    average: Tensor, score: float, gap: float, size: int, listed: int, dtype: torch.dtype
) -> Tensor:
    """For sparse_attn.

    One score sums ``size`` products and is scaled: off by ``sum_error(2 * size + 1) * score``.
    Its power has that as a relative error, and FN * (1 + gap) for exp and EPS * gap for its
    argument's subtraction; while the maximum grows, sums shrink by factors whose exponents together
    are at most gap, one per step, of which there are less than ``listed``. The maximum itself
    cancels. So each power, relative to their sum, is off by twice the relative error ``power``;
    the weighted sum and the division add theirs. bfloat16 values: each weight is rounded once.
    Definition and twin may err in opposite directions: twice all of it.

    Args:
        average: ``sum(power * |value|) / sum(power)``, the shape of the result, float64.
        score: largest ``sum(|q| * |k|) * softmax_scale``.
        gap: largest distance of a score, or of the sink, from its row's maximum; one beyond 104,
            where powers underflow, counts as 104.
        size: D.
        listed: L.
        dtype: of q and kv.
    """
    power = sum_error(2 * size + 1) * score + FN * (1 + gap) + EPS * gap
    power += listed * FN + FN * gap  # the shrinking factors
    relative = 2 * power + sum_error(2 * listed + 2) + FN
    if dtype == torch.bfloat16:
        relative += BF16
    return _and_rounding(2 * relative * average + listed * TINY, average, dtype)


def sigmoid_bound(value: Tensor, logit: float) -> Tensor:
    """For pre and post of hc_split_sinkhorn.

    The logit, one product and one sum, is off by ``2 * EPS * logit`` absolutely, its exp by that
    relatively and by FN * (1 + logit); adding 1, dividing, doubling and adding eps by less than
    2 * FN. Twice, for two implementations.

    Args:
        value: the result.
        logit: largest ``|m * scale| + |base|``.
    """
    return 2 * (2 * EPS * logit + FN * (1 + logit) + 2 * FN) * value + TINY


def sinkhorn_bound(comb: Tensor, logit: float, iters: int) -> Tensor:
    """For comb of hc_split_sinkhorn; hc is its last axis.

    Everything is positive, so nothing cancels, and a sum is relatively as good as its worst term.
    Let C be the softmax plus eps. Its logits are off by 2 * EPS * logit, and so is the maximum;
    with ``start = 4 * EPS * logit + FN * (1 + 2 * logit)`` for the powers, twice that and the
    sum's and division's error for C. Each of ``n = 2 * iters - 1`` normalisations adds ``step =
    (hc + 1) * EPS + FN`` to every cell. So the cells are those of an exact iteration whose C
    changes by a relative ``delta = 2 * start + (n + 1) * step`` at most on its way.

    An exact iteration holds cells ``r[i] * C[i, j] * c[j]`` and sets
    ``r[i] = 1 / (sum_j C[i, j] * c[j] + eps / r[i])``, then c likewise. If log C moves by delta and
    log c by v, log r moves by no more than max(delta + v, its own last move): every normalisation
    adds delta, not a factor. After n of them log r and log c are each off by n * delta at most, a
    cell by ``(2 * n + 1) * delta``. Twice, for two implementations.

    Args:
        comb: the result.
        logit: largest ``|m * scale| + |base|``.
        iters: ``hc_sinkhorn_iters``.
    """
    normalisations = 2 * iters - 1
    start = 4 * EPS * logit + FN * (1 + 2 * logit)
    step = (comb.shape[-1] + 1) * EPS + FN
    delta = 2 * start + (normalisations + 1) * step
    return 2 * (2 * normalisations + 1) * delta * comb + TINY


def _and_rounding(error: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Both results are rounded to dtype once more; magnitude bounds the result's."""
    return error + 2 * BF16 * (magnitude + error) if dtype == torch.bfloat16 else error
