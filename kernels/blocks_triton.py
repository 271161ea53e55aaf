"""Blocks of values in a kernel: how threads share them, and sums whose order is fixed.

A tile of blocks is [P, BLOCKS, T, K]: P * T * K values to a block, in this order. Triton gives a
thread K neighbours, and all P of them; so it folds P by itself, and only what is left of a block
travels between threads.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


def lane_shape(lanes: int) -> dict[str, int]:
    """How the threads of a program share a block of so many values: T of them hold P runs of K.

    Each holds 32 values, or 64 of a large tile, which has 256 threads at most. The fewer of them
    are neighbours the more a thread can add up alone; but a warp should read runs of 64 bytes.
    """
    threads = max(1, min(lanes // 32, 256))
    neighbours = min(lanes, 8 if threads < 32 else 4)
    return {"T": threads, "K": neighbours, "P": lanes // (threads * neighbours)}


@triton.jit
def fold_sum(x):
    # torch: while n > 1: n //= 2; x = x[..., :n] + x[..., n:]   [P, BLOCKS, T, K] -> [BLOCKS]
    # A sum of two terms has no order.
    P: tl.constexpr = x.shape[0]
    BLOCKS: tl.constexpr = x.shape[1]
    T: tl.constexpr = x.shape[2]
    K: tl.constexpr = x.shape[3]
    if P > 1:
        total = fold_sum(tl.sum(tl.reshape(x, (2, P // 2, BLOCKS, T, K)), 0))
    elif T > 1:
        total = fold_sum(tl.sum(tl.reshape(x, (1, BLOCKS, 2, T // 2, K)), 2))
    elif K > 1:
        total = fold_sum(tl.sum(tl.reshape(x, (1, BLOCKS, 1, 2, K // 2)), 3))
    else:
        total = tl.reshape(x, (BLOCKS,))
    return total


@triton.jit
def block_max(x):
    # torch: x.amax(-1)   [P, BLOCKS, T, K] -> [BLOCKS]
    return tl.max(tl.max(tl.max(x, 0), 2), 1)


@triton.jit
def block_count(x):
    # torch: x.sum(-1)   [P, BLOCKS, T, K] -> [BLOCKS]
    return tl.sum(tl.sum(tl.sum(x.to(tl.int32), 0), 2), 1)
