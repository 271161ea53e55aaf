"""Dot products whose bits depend on their two operands and on nothing else.

A BLAS picks the order of a sum by the shape of the matrices, the number of threads and the
machine; so a row computed alone differs from the same row in a batch. Here the order is fixed and
written down: a dot product of K values is

    cut into blocks (of 1024 values unless said otherwise; the last is filled with zeros to 16);
    in a block, lane l of 16 starts at 0 and takes the values l, l + 16, l + 32, ... in turn, each
    with one fused multiply-add; then the lanes are halved, lane l + lane l + 8, + 4, + 2, + 1;
    the blocks' sums are added in their order, starting from 0.

So a position gives the same bits alone and in a batch, in a prefill and in a decode step, on one
thread and on many, and on any CPU; on a GPU, too (``kernels.ordered_gemm_triton``). Every operation
is IEEE float32, rounded to nearest.

Speed comes from computing a tile of 4 x 6 products at once in vector registers. The inner loop is
written in LLVM's own terms, because there is no other way to say "16 lanes, fused" to numba; it
reaches about 0.9 of what MKL does on one AVX-512 core, at any number of rows.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from dsv4_quant.kernels.jit_numba import kernel

LANES = 16
BLOCK = 1024
"""Values that are summed in lanes before the lanes are added up."""

ROWS, COLUMNS = 4, 6
"""A tile: rows of x times rows of w. 24 sums and 7 operands, of 32 vector registers."""

NARROW = 2
"""Rows of w in the tiles for what is left over."""

GROUP = 64
"""Rows of x that are taken through all rows of w together."""

Floats = NDArray[np.float32]

_F32, _I64 = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)


def _sum_lanes(builder: Any, vector: Any) -> Any:
    """Lane l + lane l + width / 2, until one is left."""
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                vector,
                ir.Constant(vector.type, ir.Undefined),
                ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(at, at + width))),
            )
            for at in (0, width)
        ]
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def _declared(module: Any, name: str) -> Any:
    """LLVM's own function of three vectors; declared once per module."""
    known = module.globals.get(name)
    return known or ir.Function(module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), name)


def _tile(rows: int, columns: int) -> Any:
    """A function that adds ``rows x columns`` dot products of one block to y."""

    @intrinsic
    def add_products(
        _: Any, x: Any, w: Any, y: Any, count: Any, x_step: Any, w_step: Any, y_step: Any
    ) -> Any:
        """x, w, y: addresses of the first element; count of values, a multiple of LANES; steps
        from row to row, in values. ``y[i, j] += sum(x[i, :count] * w[j, :count])``."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, w, y, count, x_step, w_step, y_step = args
            pointer = _F32.as_pointer()
            x, w, y = (builder.inttoptr(address, pointer) for address in (x, w, y))
            fma = _declared(builder.module, f"llvm.fma.v{LANES}f32")

            def at(base: Any, row: int, step: Any) -> Any:
                return builder.gep(base, [builder.mul(_I64(row), step)])

            def load(start: Any, k: Any) -> Any:
                where = builder.bitcast(builder.gep(start, [k]), _VECTOR.as_pointer())
                return builder.load(where, align=4)

            x_rows = [at(x, i, x_step) for i in range(rows)]
            w_rows = [at(w, j, w_step) for j in range(columns)]
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            with builder.goto_entry_block():  # LLVM turns each into one register
                sums = [[builder.alloca(_VECTOR) for _ in w_rows] for _ in x_rows]
            for one in itertools.chain(*sums):
                builder.store(zero, one)
            with cgutils.for_range_slice(builder, _I64(0), count, _I64(LANES)) as (k, _):
                x_values = [load(start, k) for start in x_rows]
                for j, start in enumerate(w_rows):
                    w_value = load(start, k)
                    for i, x_value in enumerate(x_values):
                        total = builder.load(sums[i][j])
                        builder.store(builder.call(fma, [x_value, w_value, total]), sums[i][j])
            for i in range(rows):
                for j in range(columns):
                    where = builder.gep(at(y, i, y_step), [_I64(j)])
                    block_sum = _sum_lanes(builder, builder.load(sums[i][j]))
                    builder.store(builder.fadd(builder.load(where), block_sum), where)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return add_products


_add_tile = _tile(ROWS, COLUMNS)
_add_narrow = _tile(ROWS, NARROW)
_add_one = _tile(1, 1)


@kernel
def multiply(x: Floats, w: Floats, y: Floats, column: int, block: int) -> None:
    """``y[:, column : column + N] = x @ w.T``: x ``[M, K]``, w ``[N, K]``, y ``[M, ...]``.

    All C-contiguous. K and block must be multiples of LANES, M of ROWS and N of NARROW: fill up
    with zeros.
    """
    (m, k), n, width = x.shape, w.shape[0], y.shape[1]
    whole = n - n % COLUMNS
    y[:, column : column + n] = 0
    for start in range(0, k, block):
        count = min(block, k - start)
        for first in range(0, m, GROUP):  # both operands of what follows fit the L2 cache
            for j in range(0, n, COLUMNS):
                w_at = w.ctypes.data + 4 * (j * k + start)
                for row in range(first, min(first + GROUP, m), ROWS):
                    x_at = x.ctypes.data + 4 * (row * k + start)
                    y_at = y.ctypes.data + 4 * (row * width + column + j)
                    if j < whole:
                        _add_tile(x_at, w_at, y_at, count, k, k, width)
                        continue
                    for more in range(0, n - whole, NARROW):
                        _add_narrow(x_at, w_at + 4 * more * k, y_at + 4 * more, count, k, k, width)


@kernel
def multiply_rows(x: Floats, w: Floats, y: Floats) -> None:
    """``y[m] = x[m] . w[m]``: x and w ``[M, K]``, K a multiple of LANES; one block."""
    m, k = x.shape
    x_step, w_step = x.strides[0] // 4, w.strides[0] // 4
    y[:] = 0
    for row in range(m):
        x_at, w_at = x.ctypes.data + 4 * row * x_step, w.ctypes.data + 4 * row * w_step
        _add_one(x_at, w_at, y.ctypes.data + 4 * row, k, x_step, w_step, 1)
