"""Weights that a lossy conversion rounded, next to the checkpoint that they were made of.

Their values differ from the source's, and are meant to. What the manifest states of them can be
checked nevertheless: the digest of the values that each was made of (``source``) against the other
checkpoint's, and what rounding cost (``requantised``) against what both values say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.checkpoint.manifest import MANIFEST, TensorRecord
from dsv4_quant.formats.cost import Cost
from dsv4_quant.strict_json import shown
from dsv4_quant.validators.report import Finding, error

SUMS_AGREE = 1e-9
"""Relative: the conversion adds up block by block, this module leaf by leaf."""


@dataclass(slots=True)
class Measured:
    """What rounding changed in one weight; see Cost. Parts may come in any order."""

    value_squares: list[float] = field(default_factory=list)
    """One sum per part, so that their order does not matter in the end."""
    error_squares: list[float] = field(default_factory=list)
    largest_error: float = 0.0
    flushed: int = 0

    def add(self, before: NDArray[Any], after: NDArray[Any]) -> None:
        """Values ``[rows, C]`` of the source, and what became of them. Sums are float64."""
        values = before.astype(np.float64)
        with np.errstate(invalid="ignore"):  # damaged values may be infinite
            errors = np.abs(values - after)
        self.flushed += int(np.count_nonzero((before != 0) & (after == 0)))
        self.largest_error = max(self.largest_error, float(errors.max(initial=0)))
        for squares, held in ((self.value_squares, values), (self.error_squares, errors)):
            squares.append(float(np.square(held, out=held).sum()))

    def join(self, other: Measured) -> None:
        """Another part of the same weight."""
        self.value_squares += other.value_squares
        self.error_squares += other.error_squares
        self.largest_error = max(self.largest_error, other.largest_error)
        self.flushed += other.flushed


def judge_source(
    name: str, file: str, record: TensorRecord, theirs: str | None
) -> Iterator[Finding]:
    """Whether a rounded weight was made of the other checkpoint's values.

    ``theirs``: their value digest; None where they hold NaN, which no conversion rounds.
    """
    if theirs != record.source:
        yield error("against", f"made of the values {record.source}",
                    "By its manifest the weight was rounded from other values than the other"
                    " checkpoint's.", file=file, tensor=name,
                    expected="no NaN" if theirs is None else f"of {theirs}")  # fmt: skip


def judge_cost(name: str, stated: Cost, measured: Measured) -> Iterator[Finding]:
    """Whether the manifest states what rounding cost, of a weight whose digests both agree.

    Saturated values and exact blocks are not measured.
    """
    sums = {key: math.fsum(getattr(measured, key)) for key in ("value_squares", "error_squares")}
    wrong: dict[str, float] = {
        key: held
        for key, held in sums.items()
        if not math.isclose(getattr(stated, key), held, rel_tol=SUMS_AGREE)
    }
    largest = float(np.float32(measured.largest_error))
    for key, exact in (("largest_error", largest), ("flushed", measured.flushed)):
        if getattr(stated, key) != exact:
            wrong[key] = exact
    if wrong:
        said = ", ".join(f"{key} {shown(getattr(stated, key))}" for key in wrong)
        meaning = "The manifest states another error than is measured."
        yield error("against", said, meaning, file=MANIFEST, tensor=name,
                    expected=", ".join(f"{key} {held}" for key, held in wrong.items()))  # fmt: skip
