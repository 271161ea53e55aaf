"""What a user asks a conversion for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsv4_quant.catalogue import Layout
from dsv4_quant.checkpoint.sums import HashKind
from dsv4_quant.errors import UsageError
from dsv4_quant.formats.rules import ScaleRule

Experts = Literal["keep", "fp4", "fp8", "bf16"]
Dense = Literal["keep", "fp8", "bf16"]


@dataclass(frozen=True, slots=True)
class Request:
    """The output's layout and formats; ``gpus`` is 1 for hf."""

    layout: Layout = "mp"
    gpus: int = 1
    experts: Experts = "keep"
    dense: Dense = "keep"
    lossy: bool = False
    """Round what the new format cannot hold, instead of refusing it."""
    rule: ScaleRule = ScaleRule.LEAST_SQUARES
    """How rounded blocks get their scales."""
    sums: HashKind = "sha256"
    """The hash that files get."""
    calibration: Mapping[str, Any] | None = None
    """What the Factors that experts are rounded with say of themselves; set by ``convert``."""

    def __post_init__(self) -> None:
        if self.layout == "hf" and self.gpus != 1:
            raise UsageError("The hf layout is not split over GPUs: leave out the GPU count")
