"""What the inputs of a matrix say about rounding it: whose error another column can make up for.

A row w of a weight ``[R, C]`` is to become a row q of grid points such that the outputs change
least: ``|X (w - q)|**2`` over inputs X ``[n, C]`` that were seen, not ``|w - q|**2``. The
second-order method takes one column after the other, rounds it, and moves what is still to be
rounded to where the output error so far is best made up for: Optimal Brain Surgeon (Hassibi &
Stork 1993), column by column for whole matrices as in GPTQ (Frantar et al. 2023, arXiv
2210.17323, equations 2 and 3). With the set F of columns still to be rounded and
``H = X'X + penalty``, the best place for them is

    w_F + inv(H_FF) X_F' r,        r = sum over the columns done of x_j (w_j - q_j)

An expert sees far fewer inputs than it has columns, so nothing of C x C is made here. With the
penalty diagonal, ``inv(Z_F'Z_F + c) Z_F' = Z_F' inv(Z_F Z_F' + c)`` (Woodbury): an n x n matrix P
takes the place of H's inverse and of its Cholesky factor; same result, C / n times less to do. P
grows from the last column to the first, where it is a sum of positive terms and loses nothing.

The penalty. GPTQ adds 1 % of H's mean diagonal, which is far too little where inputs are few:
they look correlated by chance, and what is fitted to chance makes other inputs worse (measured in
``benchmarks/calibration.py``). Here H is shrunk towards its own diagonal by as much as it is
uncertain (Schaefer & Strimmer 2005, Statistical Applications in Genetics and Molecular Biology
4(1), 32; after Ledoit & Wolf 2004):

    H = (1 - a) X'X + a diag(X'X),   a = sum of var(h_ij) / sum of h_ij**2, over all i != j

Columns count as correlated after they were brought to one size. Inputs are not independent: a token
comes again, neighbours share their context. So the variance is taken between groups of inputs:
SEGMENTS runs of neighbours, and again about as many groups of whole tokens; the larger one counts.
Taken one by one, the inputs of a text of few different tokens would be believed far too much. White
inputs give an a near 1. Above MOST_SHRINKAGE there is as much to lose as to gain, and nothing is
moved.

Everything is float64 in a fixed order, on the caller's thread: no BLAS, whose bits depend on its
threads. Columns go by decreasing size (GPTQ's ``act-order``): the costly errors first, while there
are many left to make up for them.

n inputs, C columns, B = BLOCK columns whose errors are passed on together.
"""

from __future__ import annotations

from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.kernels.jit_numba import kernel, part

BLOCK = 64

SEGMENTS = 32
"""Groups of inputs that the variance of the moments is taken between."""

LEAST_SHRINKAGE = 0.01
"""GPTQ's damping; keeps n identical inputs from being believed."""

MOST_SHRINKAGE = 0.9
"""Where inputs say less than that, outputs changed by -1 % to +1 % on held-out prompts."""

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


class Factor(NamedTuple):
    """What rounding needs to know; columns in the order in which they are rounded."""

    order: NDArray[np.int64]
    """``[C]``: the column of the weight."""
    inputs: Floats
    """``[m, C]``: X up to a power of two; m = n, or C if there are more inputs than columns."""
    gains: Floats
    """``[C, m]``: a column moves by ``gains . r``, r being the output error before its block."""
    within: Floats
    """``[C, B]``: ``gains . x_j`` for the columns j before it in its block, 0 elsewhere."""
    shrinkage: float
    """a: 0 believes the inputs, 1 would move nothing."""


def factor(
    inputs: Floats, tokens: NDArray[np.integer[Any]] | None = None, shrinkage: float | None = None
) -> Factor | None:
    """Prepares the rounding of weights that see these inputs.

    Args:
        inputs: ``[n, C]``, finite; neighbours in a text are neighbours here.
        tokens: ``[n]``: the id of the token that each comes from, if that is known.
        shrinkage: a, instead of an estimate.

    Returns:
        None where nothing is to be moved, as with no inputs or one. Memory meanwhile is
        about ``8 (3 n C + 2 m**2)`` bytes, afterwards ``8 m C``.

    Raises:
        ValueError: an input is infinite or NaN.
    """
    if not np.isfinite(inputs).all():
        raise ValueError("an input is not finite")
    largest = float(np.abs(inputs).max(initial=0))
    x = np.ldexp(inputs.astype(np.float64), -int(np.frexp(largest)[1]))  # below 1
    sizes = np.sqrt(np.square(x).sum(0))  # [C]
    order = np.argsort(-sizes, kind="stable")
    sizes = sizes[order]
    z = np.divide(x[:, order], sizes, out=np.zeros_like(x), where=sizes > 0)  # of length 1 or 0
    a = shrinkage_of(z, tokens) if shrinkage is None else shrinkage
    if a > MOST_SHRINKAGE:
        return None
    a = max(a, LEAST_SHRINKAGE)
    penalty = a / (1 - a)
    if len(z) > z.shape[1]:  # as many rows with the same moments, and half the penalty in them
        moments = _gram(z.T)
        moments[np.diag_indices_from(moments)] += penalty / 2
        z, penalty = _cholesky(moments), penalty / 2
    gains, within = np.empty(z.shape[::-1]), np.zeros((z.shape[1], BLOCK))
    _gains(z, z.T.copy(), penalty, gains, within)
    inverse = np.divide(1, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    gains *= inverse[:, None]
    for start in range(0, len(sizes), BLOCK):
        some = slice(start, start + BLOCK)
        within[some, : len(sizes[some])] *= inverse[some, None] * sizes[some]
    z *= sizes
    return Factor(
        order, z.astype(np.float32), gains.astype(np.float32), within.astype(np.float32), a
    )


def shrinkage_of(z: Doubles, tokens: NDArray[np.integer[Any]] | None = None) -> float:
    """The intensity a of the module's docstring, 0 to 1.

    The variance of a sum T over g groups, of their sums T_s: ``g / (g - 1) * (sum of T_s**2 -
    T**2 / g)``. Sums over i and j of squares of ``Z'Z`` are those of ``ZZ'``, which is smaller.

    Args:
        z: ``[n, C]``, columns of length 1 or 0.
        tokens: ``[n]``, as for :func:`factor`.
    """
    n = len(z)
    total = float(np.square(_gram(z if n <= z.shape[1] else z.T)).sum())
    apart = total - float(np.square(np.square(z).sum(0)).sum())  # over i != j, as all below
    edges = np.unique(np.arange(SEGMENTS + 1) * n // SEGMENTS)
    variance = _variance(z, edges, apart)
    if tokens is not None and n:
        order = np.argsort(tokens, kind="stable")
        begins = np.flatnonzero(np.diff(tokens[order], prepend=-1, append=-1))  # of every token
        at = begins[np.searchsorted(begins, edges)]  # a token is never cut in two
        variance = max(variance, _variance(z[order], np.unique(at), apart))
    return 1.0 if variance >= apart else max(variance / apart, 0.0)


def _variance(z: Doubles, edges: NDArray[np.integer[Any]], apart: float) -> float:
    """Of ``T_ij``, summed over i != j, from groups of rows that begin and end at the edges.

    apart: the sum of ``T_ij ** 2``. Infinite for fewer than two groups.
    """
    g = len(edges) - 1
    if g < 2:
        return inf
    parts = 0.0
    for start, stop in pairwise(edges):
        parts += float(np.square(_gram(z[start:stop])).sum())
        parts -= float(np.square(np.square(z[start:stop]).sum(0)).sum())
    return g / (g - 1) * (parts - apart / g)


def _gram(z: Doubles) -> Doubles:
    """``ZZ'``."""
    out = np.zeros((len(z), len(z)))
    _product(np.ascontiguousarray(z), np.ascontiguousarray(z.T), out)
    return out


@kernel
def _product(a: Doubles, b: Doubles, out: Doubles) -> None:
    _add_product(a, b, out)


@part
def _add_product(a: Doubles, b: Doubles, out: Doubles) -> None:
    """``out += a @ b``. Eight rows of b at a time, so that out is seldom read, and all rows of out
    with BLOCK rows of b, while these are in the cache. Every sum is taken in b's order."""
    rows, inner = a.shape
    cols = b.shape[1]
    for start in range(0, inner, BLOCK):
        stop = min(start + BLOCK, inner)
        for row in range(rows):
            into = out[row]
            k = start
            while k + 8 <= stop:
                a0, a1, a2, a3 = a[row, k], a[row, k + 1], a[row, k + 2], a[row, k + 3]
                a4, a5, a6, a7 = a[row, k + 4], a[row, k + 5], a[row, k + 6], a[row, k + 7]
                b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
                b4, b5, b6, b7 = b[k + 4], b[k + 5], b[k + 6], b[k + 7]
                for col in range(cols):
                    one = (a0 * b0[col] + a1 * b1[col]) + (a2 * b2[col] + a3 * b3[col])
                    other = (a4 * b4[col] + a5 * b5[col]) + (a6 * b6[col] + a7 * b7[col])
                    into[col] += one + other
                k += 8
            while k < stop:
                single, line = a[row, k], b[k]
                for col in range(cols):
                    into[col] += single * line[col]
                k += 1


@kernel
def _cholesky(h: Doubles) -> Doubles:
    """The upper triangle u with ``u' u = h``, of a positive definite h, which is overwritten."""
    size = len(h)
    u = np.zeros((size, size))
    for k in range(size):
        root = np.sqrt(h[k, k])
        for col in range(k, size):
            u[k, col] = h[k, col] / root
        for row in range(k + 1, size):
            one, line, into = u[k, row], u[k], h[row]
            for col in range(row, size):
                into[col] -= one * line[col]
    return u


@kernel
def _gains(z: Doubles, zt: Doubles, penalty: float, gains: Doubles, within: Doubles) -> None:
    """``gains[j] = inv(Z_F Z_F' + penalty) z_j`` with F = {j, j + 1, ...}, and what a block needs.

    P is the inverse for the columns after j. A column joins by Sherman and Morrison's rule: with
    ``p = P z_j`` and ``d = 1 + z_j . p``, gains[j] is ``p / d`` and P loses ``p p' / d``. A block's
    columns join together: first the scalars ``m = z_i . P z_j``, from the last column up, then the
    vectors.
    """
    n, cols = z.shape
    inverse = np.zeros((n, n))
    for i in range(n):
        inverse[i, i] = 1 / penalty
    start = (cols - 1) // BLOCK * BLOCK
    while start >= 0:
        b = min(BLOCK, cols - start)
        p = np.zeros((b, n))
        _add_product(zt[start : start + b], inverse, p)
        m = np.zeros((b, b))
        _add_product(p, z[:, start : start + b].copy(), m)
        for i in range(b - 1, -1, -1):
            d = 1 + m[i, i]
            for j in range(i):
                share = m[i, j] / d
                within[start + i, j] = share
                for k in range(i):
                    m[j, k] -= share * m[i, k]
                for t in range(n):
                    p[j, t] -= share * p[i, t]
            for t in range(n):
                gains[start + i, t] = p[i, t] / d
        _add_product(-p.T.copy(), gains[start : start + b], inverse)
        start -= BLOCK
