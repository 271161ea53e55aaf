"""``--calibrate``: codes that change a matrix's outputs least, under the scales already chosen.

Whoever calls a conversion may hand it Factors, which know what inputs an expert sees; it does not
know the model that found them. Scales stay those of plain rounding: they come before the codes in
a file, and are written before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.checkpoint.digest import leaf_rows
from dsv4_quant.conversion.casts import Casts
from dsv4_quant.conversion.operations import Panel, Proof
from dsv4_quant.conversion.requantise import Rounded
from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.formats.blocks import Tensor
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.figures import EXACT, FLUSHED, SATURATED, Figures

if TYPE_CHECKING:
    from dsv4_quant.kernels.second_order_factor_numba import Factor

Doubles = NDArray[np.float64]


class Factors(Protocol):
    """What calibration gives a conversion."""

    def reserve(self, most: int, threads: int) -> int:
        """Bytes that it will hold while a conversion runs; about ``most``, if that will do."""
        ...

    def factor(self, name: str) -> Factor | None:
        """For the rows of that weight; None where they are to be rounded plainly."""
        ...

    def held_out(self, name: str) -> NDArray[np.float32]:
        """Inputs ``[n, C]`` that the factor has not seen."""
        ...

    def describe(self) -> dict[str, Any]:
        """For the manifest: plain data, the same for the same prompts and weights, another for
        others; ``identity`` is a hash of what was run."""
        ...


@dataclass(frozen=True, slots=True)
class Calibrated:
    """One thread's casts: those of another, but for the codes of rounded experts."""

    plain: Casts
    factors: Factors

    def weight(self, operation: str, panel: Panel, proof: Proof) -> NDArray[Any]:
        """See Casts."""
        return self.plain.weight(operation, panel, proof)

    def scale(self, operation: str, panel: Panel) -> NDArray[Any]:
        """See Casts."""
        return self.plain.scale(operation, panel)

    def requantise(self, panel: Panel, rule: ScaleRule) -> Rounded:
        """See Casts."""
        rounded = self.plain.requantise(panel, rule)
        factor = self.factors.factor(panel.name)
        if factor is None:
            return rounded
        return calibrated(panel, rounded, factor, self.factors.held_out(panel.name))

    def rounded_scales(self, panel: Panel, rule: ScaleRule) -> NDArray[Any]:
        """See Casts."""
        return self.plain.rounded_scales(panel, rule)


def calibrated(
    panel: Panel, plain: Rounded, factor: Factor, held_out: NDArray[np.float32]
) -> Rounded:
    """The same rows, rounded for their inputs where held-out inputs say that it is better.

    A tile that FP4 gives FP8 exactly stays as it is, so FP4 weights keep their plain rounding.
    """
    from dsv4_quant.kernels.second_order_check_numba import UNIT, wins

    if panel.tensor.format.kind == "fp4" or not plain.figures.error_squares.any():
        return plain
    values = panel.tensor.decode()
    moved = second_order(values, plain.tensor, factor)
    unit = min(UNIT, leaf_rows(values.shape[1]))  # panels are made of these, whatever their size
    errors = (values - plain.tensor.decode(), values - moved.decode())
    better = wins(held_out, *errors, unit)
    if not better.any():
        return plain
    made = replace(moved, codes=np.where(better[:, None], moved.codes, plain.tensor.codes))
    return Rounded(made, _measured(values, made, plain.figures), int(better.sum()))


def second_order(values: NDArray[np.float32], plain: Tensor, factor: Factor) -> Tensor:
    """``values``, rounded plainly in ``plain``, with the codes that the factor's inputs prefer."""
    from dsv4_quant.kernels.second_order_numba import round_fp4, round_fp8

    assert plain.format.block is not None and plain.scales is not None
    codes = np.empty_like(plain.codes)
    if plain.format.kind == "fp4":
        status = round_fp4(values, plain.scales, plain.format.block[1], factor, codes)
    else:
        status = round_fp8(values, plain.scales, plain.format.block, factor, codes)
    assert not status, "plain rounding has refused what is not finite"
    return replace(plain, codes=codes)


def _measured(values: NDArray[np.float32], made: Tensor, plain: Figures) -> Figures:
    """The figures of given codes, in the order of sums that ``kernels.figures`` defines."""
    kept, wide = made.decode(), values.astype(np.float64)
    errors = wide - kept
    assert made.format.block is not None and made.scales is not None
    block = made.format.block
    sums = _folded(_in_blocks(np.square(errors), block))  # [h, w]
    top = (e2m1 if made.format.kind == "fp4" else e4m3).VALUES
    limit = np.nanmax(top) * e8m0.VALUES[made.scales].astype(np.float64)
    beyond = _in_blocks(np.abs(wide), block) > limit[..., None]
    figures = Figures.empty(len(sums))
    figures.value_squares[:] = plain.value_squares
    figures.error_squares[:] = np.cumsum(sums, axis=1)[:, -1]
    figures.largest_error[0] = np.abs(errors).max(initial=0)
    figures.counts[:], figures.scales[:] = plain.counts, plain.scales
    figures.counts[SATURATED] = beyond.sum()
    figures.counts[FLUSHED] = ((values != 0) & (kept == 0)).sum()
    figures.counts[EXACT] = (sums == 0).sum()
    return figures


def _in_blocks(values: Doubles, block: tuple[int, int]) -> Doubles:
    """``[R, C]`` -> ``[h, w, b * c]``, zeros where a block reaches beyond the edge."""
    (b, c), (rows, cols) = block, values.shape
    h, w = -(-rows // b), -(-cols // c)
    padded = np.pad(values, ((0, h * b - rows), (0, w * c - cols)))
    return padded.reshape(h, b, w, c).transpose(0, 2, 1, 3).reshape(h, w, b * c)


def _folded(squares: Doubles) -> Doubles:
    """Sums of the last axis by halves, filled up to a power of two."""
    n = 1 << (squares.shape[-1] - 1).bit_length()
    squares = np.pad(squares, ((0, 0), (0, 0), (0, n - squares.shape[-1])))
    while n > 1:
        n //= 2
        squares = squares[..., :n] + squares[..., n:]
    return squares[..., 0]
