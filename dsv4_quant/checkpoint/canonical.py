"""The canonical bytes of a leaf of the value digest: FP4, BF16 or float32, the first that holds it.

Each storage takes the shortest way to the same bytes. FP4 is rewritten as it is; FP8, BF16 and
float32 are made BF16, and BF16 is tried as FP4: the first row alone before the others, because what
is no FP4, like most weights that are not experts, mostly shows it there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats.blocks import BITS, Tensor
from dsv4_quant.kernels.bf16_to_fp4_numba import bf16_to_fp4_exact
from dsv4_quant.kernels.canonical_fp4_numba import GROUP, canonical_fp4
from dsv4_quant.kernels.canonical_numba import canonical_bf16, canonical_f32, f32_to_bf16
from dsv4_quant.kernels.fp4_to_bf16_numba import fp4_to_bf16
from dsv4_quant.kernels.fp8_to_bf16_numba import fp8_to_bf16
from dsv4_quant.kernels.fp8_to_f32_numba import fp8_to_f32
from dsv4_quant.kernels.jit_numba import INEXACT, NAN

Bytes = NDArray[np.uint8]
Half = NDArray[np.uint16]
Single = NDArray[np.float32]


class Canonical:
    """Makes canonical bytes. Not shared between threads: it reuses its buffers."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}
        self._fault = np.zeros(3, np.int64)

    def leaf(self, panel: Tensor, start: int, stop: int) -> tuple[int, NDArray[Any]] | None:
        """Bits per value, and the bytes, of the panel's rows [start, stop); None if one is NaN.

        For quantised weights the panel begins with the first row of a block. The bytes are good
        until the next call.
        """
        rows, cols = stop - start, panel.shape[-1]
        codes = panel.codes.reshape(-1, panel.codes.shape[-1])[start:stop]
        if panel.format.kind == "i64":
            return BITS["i64"], np.ascontiguousarray(codes)
        flags = 0
        if panel.format.kind == "fp4" and cols % GROUP == 0:
            assert panel.scales is not None
            whole, *fp4 = self._fp4(rows, cols)
            flags = canonical_fp4(codes, panel.scales[start:stop], *fp4)
            if not flags:
                return BITS["fp4"], whole
        half = self._buffer("bf16", 2 * rows * cols).view(np.uint16).reshape(rows, cols)
        flags |= _to_bf16(panel, codes, start, half)
        if flags & INEXACT and not flags & NAN:
            single = self._buffer("f32", 4 * rows * cols).view(np.float32).reshape(rows, cols)
            flags = _to_f32(panel, codes, start, single)
            if flags == INEXACT:
                return BITS["f32"], single
            f32_to_bf16(single, half)
        if flags & NAN:
            return None
        held = self._as_fp4(half)
        return (BITS["bf16"], half) if held is None else (BITS["fp4"], held)

    def _as_fp4(self, half: Half) -> Bytes | None:
        """The FP4 form of BF16 values without -0; None if they have none."""
        rows, cols = half.shape
        if cols % GROUP:
            return None
        whole, codes, scales = self._fp4(rows, cols)
        for first, last in ((0, 1), (1, rows)):
            part = slice(first, last)
            if bf16_to_fp4_exact(half[part], GROUP, scales[part], codes[part], self._fault):
                return None
        return whole

    def _fp4(self, rows: int, cols: int) -> tuple[Bytes, Bytes, Bytes]:
        """A leaf's bytes in FP4, and in them its codes and its scales."""
        packed, groups = cols // 2, cols // GROUP
        whole = self._buffer("fp4", rows * (packed + groups))
        codes, scales = whole[: rows * packed], whole[rows * packed :]
        return whole, codes.reshape(rows, packed), scales.reshape(rows, groups)

    def _buffer(self, name: str, size: int) -> Bytes:
        held = self._buffers.get(name)
        if held is None or held.size < size:
            held = self._buffers[name] = np.empty(size, np.uint8)
        return held[:size]


def _to_bf16(panel: Tensor, codes: NDArray[Any], row: int, out: Half) -> int:
    """Rows from ``row`` on as BF16 without -0, and the flags; float32 is not tried."""
    form, scales = panel.format, panel.scales
    if form.kind == "bf16":
        return canonical_bf16(codes, out)
    if form.kind == "f32":
        return INEXACT
    assert scales is not None and form.block is not None
    if form.kind == "fp8":
        return fp8_to_bf16(codes, scales, row, *form.block, out, canonical=True)
    if out.shape[1] % form.block[1]:
        return INEXACT  # the kernel takes no ragged blocks
    return fp4_to_bf16(codes, scales[row : row + len(codes)], form.block[1], out)


def _to_f32(panel: Tensor, codes: NDArray[Any], row: int, out: Single) -> int:
    """Rows from ``row`` on as float32 without -0, and the flags."""
    form, scales = panel.format, panel.scales
    if form.kind == "fp8":
        assert scales is not None and form.block is not None
        fp8_to_f32(codes, scales, row, *form.block, out)
    elif form.kind == "fp4":
        assert scales is not None
        out[:] = Tensor(form, out.shape, codes, scales[row : row + len(codes)]).decode()
    else:
        out[:] = codes
    return canonical_f32(out, out)
