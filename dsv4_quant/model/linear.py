"""Products of activations and stored weights, spread over threads without moving a bit.

Every output value is one dot product (``dot``), whole, on one thread. Threads only share out the
rows of the weight, so their number changes who computes a value and never the value.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dsv4_quant.formats.blocks import F32
from dsv4_quant.formats.blocks import Tensor as Weight
from dsv4_quant.model.dot import BLOCK, COLUMNS, LANES, NARROW, ROWS, multiply, multiply_rows
from dsv4_quant.model.panels import decode_panel

Floats = NDArray[np.float32]

PANEL_VALUES = 1 << 18
"""Decoded values that a thread holds at a time, 1 MiB: they must stay in its L2 cache."""

SMALL = 1 << 21
"""Products of fewer multiplications are not worth waking another thread."""


class Products(Protocol):
    """What multiplies: ``Workers``, or a device (``on_device``) with the same bits."""

    device: str
    """Its name, for people."""

    def linear(
        self,
        x: torch.Tensor,
        weight: Weight,
        rows: tuple[int, int] | None = None,
        block: int | None = BLOCK,
    ) -> torch.Tensor:
        """``x @ decoded(weight)[rows].T`` in float32.

        Args:
            x: ``[..., K]`` float32.
            weight: ``[N, K]`` in any format that holds floats.
            rows: first row and end, all rows if not given.
            block: values that are summed in lanes before the lanes are added up; None: all.

        Returns:
            ``[..., rows]`` float32. A value's bits depend on its row of x, its row of the weight
            and block alone (the bits of a NaN aside).
        """


class Workers:
    """Threads that share out rows of weights; a context manager."""

    device = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.threads, "product")

    def linear(
        self,
        x: torch.Tensor,
        weight: Weight,
        rows: tuple[int, int] | None = None,
        block: int | None = BLOCK,
    ) -> torch.Tensor:
        """See Products."""
        first, last = rows or (0, weight.shape[0])
        count = last - first
        left = _filled(x.reshape(-1, x.shape[-1]).numpy(), ROWS)  # [M, K], both filled up
        out = np.empty((len(left), _up(count, NARROW)), np.float32)
        step = block or max(left.shape[1], LANES)

        def work(start: int, stop: int) -> None:
            _multiply_panels(left, weight, first, start, min(stop, count), out, step)

        small = left.size * count < SMALL
        self._share(work, out.shape[1], 1 if small else self.threads)
        made = torch.from_numpy(out)[: x.shape[:-1].numel(), :count]
        return made.reshape(*x.shape[:-1], count)

    def _share(self, work: Callable[[int, int], None], count: int, parts: int) -> None:
        """Calls ``work(start, stop)`` on about equal parts of range(count), at the same time."""
        step = _up(-(-count // parts), NARROW)
        tasks = [
            self._pool.submit(work, at, min(at + step, count)) for at in range(step, count, step)
        ]
        work(0, min(step, count))
        for task in tasks:
            task.result()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def as_weight(matrix: torch.Tensor) -> Weight:
    """Activations ``[N, K]`` in the place of a weight."""
    return Weight(F32, tuple(matrix.shape), matrix.contiguous().numpy())


def dot_rows(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``sum(x * w)`` over the last axis, ``[..., K]`` -> ``[...]``, in the order of ``dot``."""
    left = _filled(x.reshape(-1, x.shape[-1]).numpy(), 1)
    right = left if x is w else _filled(w.expand_as(x).reshape(-1, x.shape[-1]).numpy(), 1)
    out = np.empty(left.shape[0], np.float32)
    multiply_rows(left, right, out)
    return torch.from_numpy(out).reshape(x.shape[:-1])


_scratch = threading.local()


def _multiply_panels(
    x: Floats, weight: Weight, first: int, start: int, stop: int, out: Floats, block: int
) -> None:
    """``out[:, start:stop] = x @ weight[first + start : first + stop].T``, x filled up.

    Where stop is odd, one column more is overwritten.
    """
    k = x.shape[1]
    height = max(NARROW, PANEL_VALUES // k // COLUMNS * COLUMNS)
    if getattr(_scratch, "panel", np.empty(0)).size < height * k:
        _scratch.panel = np.empty(height * k, np.float32)
    panel = _scratch.panel[: height * k].reshape(height, k)
    panel[:, weight.shape[1] :] = 0
    for row in range(start, stop, height):
        count = min(height, stop - row)
        decode_panel(weight, first + row, first + row + count, panel)
        used = _up(count, NARROW)
        panel[count:used] = 0
        multiply(x, panel[:used], out, row, block)


def _filled(x: Floats, rows: int) -> Floats:
    """x ``[M, K]`` with zeros up to a multiple of ``rows`` and of LANES."""
    m, k = _up(x.shape[0], rows), _up(x.shape[1], LANES)
    if (m, k) == x.shape and x.flags.c_contiguous:
        return x
    filled = np.zeros((m, k), np.float32)
    filled[: x.shape[0], : x.shape[1]] = x
    return filled


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
