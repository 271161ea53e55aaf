"""What casts the panels of a conversion: the processor, or a device that the processor checks.

Who casts changes no byte of the output, no proof, no cost and no error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from dsv4_quant.conversion import operations
from dsv4_quant.conversion.operations import Panel, Proof

if TYPE_CHECKING:
    from dsv4_quant.conversion.requantise import Rounded
    from dsv4_quant.formats.rules import ScaleRule


class Casts(Protocol):
    """One thread's casts of panels; names and errors as in ``operations`` and ``requantise``."""

    def weight(self, operation: str, panel: Panel, proof: Proof) -> NDArray[Any]:
        """The codes of the output rows, exact; what they prove goes to ``proof``."""
        ...

    def scale(self, operation: str, panel: Panel) -> NDArray[Any]:
        """The scales of the output rows."""
        ...

    def requantise(self, panel: Panel, rule: ScaleRule) -> Rounded:
        """The output rows, rounded where they must be, and what that cost."""
        ...

    def rounded_scales(self, panel: Panel, rule: ScaleRule) -> NDArray[Any]:
        """The scales of rows that are rounded."""
        ...


class OnProcessor:
    """The compiled casts."""

    def weight(self, operation: str, panel: Panel, proof: Proof) -> NDArray[Any]:
        """See Casts."""
        return operations.weight(operation, panel, proof)

    def scale(self, operation: str, panel: Panel) -> NDArray[Any]:
        """See Casts."""
        return operations.scale(operation, panel)

    def requantise(self, panel: Panel, rule: ScaleRule) -> Rounded:
        """See Casts."""
        from dsv4_quant.conversion.requantise import requantise  # kernels that only this needs

        return requantise(panel, rule)

    def rounded_scales(self, panel: Panel, rule: ScaleRule) -> NDArray[Any]:
        """See Casts."""
        from dsv4_quant.conversion.requantise import rounded_scales

        return rounded_scales(panel, rule)
