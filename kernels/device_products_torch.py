"""Products with stored weights on another device, for operands in host memory.

A weight travels in its stored form and is decoded there, some rows at a time, into memory that the
product reads right after (``ops.block_dequant``, ``ops.ordered_gemm``). Both are exact to the bit,
so a product is what the processor's is (``model.linear``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv4_quant.formats.blocks import Format
from dsv4_quant.formats.blocks import Tensor as Weight
from dsv4_quant.kernels import ops
from dsv4_quant.kernels.lane_torch import Array, Lane

Floats = NDArray[np.float32]

PART_BYTES = 32 << 20
"""What is on the device at a time of x, of a stored weight and of results; each."""

PANEL_BYTES = 16 << 20
"""Decoded weights that are there at a time: they should stay in a GPU's L2 cache."""


class DeviceProducts:
    """The products of one thread.

    Larger operands go there in parts. So they hold at most 4 * PART_BYTES + 2 * PANEL_BYTES of the
    device's memory, 160 MiB (results twice: of a panel, and all of them), and ten times PART_BYTES
    of pinned memory here (it grows by powers of two); more only where one row of x, or one row of
    blocks, is larger than its share. Raises DeviceError where the device fails.
    """

    def __init__(self, device: torch.device) -> None:
        self._lane = Lane(device)
        self.name = str(device)
        """For people."""
        if device.type == "cuda":
            self.name = f"{torch.cuda.get_device_name(device)} ({device})"

    def linear(self, x: Floats, weight: Weight, first: int, last: int, block: int | None) -> Floats:
        """``x @ decoded(weight)[first:last].T``: x ``[M, K]``, the result ``[M, last - first]``.

        Args:
            weight: ``[N, K]`` in any format that holds floats.
            block: as in ``ops.ordered_gemm``.
        """
        out = np.empty((len(x), last - first), np.float32)
        tall = min(len(x), max(1, PART_BYTES // (4 * x.shape[1])))
        for start, stop in _parts(weight, first, last, tall):
            for row in range(0, len(x), tall):
                some = x[row : row + tall]
                out[row : row + tall, start - first : stop - first] = self._part(
                    some, weight, start, stop, block
                )
        return out

    def _part(self, x: Floats, weight: Weight, first: int, last: int, block: int | None) -> Floats:
        """The same, with all operands at once."""
        form = weight.format
        held = form.block[0] if form.block else 1
        skipped = first % held
        arrays: list[Array] = [weight.codes[first - skipped : last]]
        if weight.scales is not None:
            arrays.append(weight.scales[first // held : -(-last // held)])

        def multiply(x: Tensor, *stored: Tensor) -> Sequence[Tensor]:
            y = torch.empty(len(x), last - first, device=x.device)
            height = _whole_blocks(PANEL_BYTES // (4 * x.shape[1]), held)
            for at in range(0, skipped + last - first, height):
                values = _decoded(form, at, at + height, *stored)[max(skipped - at, 0) :]
                begin = max(at - skipped, 0)
                y[:, begin : begin + len(values)] = ops.ordered_gemm(x, values, block)
            return [y]

        (made,) = self._lane.run(multiply, x, *arrays)
        return made


def _parts(weight: Weight, first: int, last: int, tall: int) -> Iterator[tuple[int, int]]:
    """Rows of a weight that go there together, for ``tall`` rows of x; whole blocks."""
    per_row = max(-(-weight.nbytes // weight.shape[0]), 4 * tall)
    held = weight.format.block[0] if weight.format.block else 1
    step = _whole_blocks(PART_BYTES // per_row, held)
    while first < last:
        stop = min((first + step) // held * held, last)
        yield first, stop
        first = stop


def _whole_blocks(rows: int, height: int) -> int:
    """Rows of whole blocks, one at least."""
    return max(rows // height, 1) * height


def _decoded(
    form: Format, start: int, stop: int, codes: Tensor, scales: Tensor | None = None
) -> Tensor:
    """Rows [start, stop) as float32; start is the first row of a block."""
    if scales is None:
        return codes[start:stop].float()
    assert form.block is not None
    b = form.block[0]
    return ops.block_dequant(
        codes[start:stop], scales[start // b : -(-stop // b)], form, torch.float32
    )
