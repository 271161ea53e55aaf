"""What a weight's step gives besides bytes, put together from panels: digests, proof, cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4_quant.checkpoint.digest import TensorDigest
from dsv4_quant.conversion.operations import Proof
from dsv4_quant.conversion.plan import Step
from dsv4_quant.formats.cost import Cost

if TYPE_CHECKING:
    from dsv4_quant.kernels.figures import Figures


@dataclass(slots=True)
class Result:
    """What a weight's step gives besides its bytes."""

    read: str
    """Digest of the values that were read."""
    digest: str
    """Digest of the values that were written: another only where they were rounded."""
    proof: Proof
    cost: Cost | None = None
    """Of rounding, where that was allowed."""
    moved: int = 0
    """Rows that calibration gave other codes than the nearest."""

    def to_json(self) -> list[Any]:
        """For the journal."""
        cost = self.cost and self.cost.to_json()
        return [self.read, self.digest, self.proof.to_json(), cost, self.moved]

    @classmethod
    def from_json(cls, value: Any) -> Result:
        """The inverse of to_json."""
        read, digest, proof, cost, moved = value
        return cls(read, digest, Proof.from_json(proof), cost and Cost.from_json(cost), moved)


@dataclass(slots=True)
class OpenWeight:
    """A weight some of whose panels are still to come. By first row what is added up at the end,
    because the order of a float64 sum counts, and panels come in any."""

    step: Step
    panels: int
    """That are to come."""
    read: TensorDigest
    written: TensorDigest
    """The same object where values stay as they are."""
    proof: Proof = field(default_factory=Proof)
    figures: dict[int, Figures] = field(default_factory=dict)
    """Where values may be rounded."""
    moved: dict[int, int] = field(default_factory=dict)
    """Rows that calibration moved."""

    @classmethod
    def of(cls, step: Step, panels: int) -> OpenWeight:
        """Before the first of so many panels."""
        read = TensorDigest(*step.spec.matrix)
        return cls(step, panels, read, TensorDigest(*step.spec.matrix) if step.lossy else read)

    def result(self) -> Result:
        """After the last."""
        read = self.read.hexdigest()
        written = self.written.hexdigest() if self.step.lossy else read
        cost = _cost(self.figures) if self.step.lossy else None
        return Result(read, written, self.proof, cost, sum(self.moved.values()))


def _cost(figures: Mapping[int, Figures]) -> Cost:
    """Of a whole weight, from its panels' figures."""
    from dsv4_quant.kernels.figures import cost  # numba, which only rounding needs here

    return cost(figures[first] for first in sorted(figures))
