"""What a plan amounts to, for ``--dry-run``: nothing is written to find it out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.conversion.budget import budget
from dsv4_quant.conversion.device import Device, casts_on
from dsv4_quant.conversion.journal import freed_headers
from dsv4_quant.conversion.plan import COPY, Plan, make_plan
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.target import check_early, check_separate, disk_room

if TYPE_CHECKING:
    from dsv4_quant.hub.arrivals import Arrivals

EXACTNESS = {
    COPY: "the same bytes",
    "fp4_to_bf16": "exact; refused if a value leaves BF16's range",
    "fp8_to_bf16": "exact; refused if a value leaves BF16's range",
    "fp4_to_fp8": "exact; every tile is checked, an inexact one is refused",
    "fp8_to_fp4": "exact; every block is checked, an inexact one is refused",
    "bf16_to_fp4": "exact; every block is checked, an inexact one is refused",
    "bf16_to_fp8": "exact; every tile is checked, an inexact one is refused",
}


ROUNDED = "rounded where it must be, and what that costs is counted"


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """A conversion before it begins."""

    layout: str
    gpus: int
    formats: dict[str, str]
    files: dict[str, int]
    """Bytes of every weight file, by name."""
    bytes: int
    operations: dict[str, int]
    """Weights per operation."""
    exactness: dict[str, str]
    rounded: int
    """Weights whose values may change."""
    calibratable: int
    """Those of them that are experts and not FP4, so that calibration can choose their codes."""
    workers: int
    peak_memory: int
    disk_needed: int
    disk_free: int

    @property
    def fits(self) -> bool:
        """Whether the disk has room for it."""
        return self.disk_needed <= self.disk_free


def plan_conversion(
    src: str | Path,
    out: str | Path,
    request: Request,
    *,
    workers: int | None = None,
    max_memory: int = 4 << 30,
    overwrite: bool = False,
    move: bool = False,
    arrivals: Arrivals | None = None,
    device: Device = "cpu",
) -> PlanSummary:
    """The plan of a conversion in figures.

    Raises what ``convert`` would raise before it reads a value, but for a full disk.
    """
    casts_on(device)  # or refuses
    with Checkpoint.open(src, freed=freed_headers(Path(out)), arrivals=arrivals) as source:
        plan = make_plan(source, request)
        limits = budget(plan, workers=workers, max_memory=max_memory, device=device)
        check_separate(source.root, Path(out))
        check_early(Path(out), overwrite=overwrite)
        needed, free = disk_room(plan, Path(out), overwrite=overwrite, move=move)
        return _summary(plan, limits.workers, limits.peak_bytes, needed, free)


def _summary(plan: Plan, workers: int, peak: int, needed: int, free: int) -> PlanSummary:
    formats = plan.catalogue.formats
    operations: Counter[str] = plan.operations
    rounded = [step.spec for step in plan.steps if step.lossy and not step.out.is_scale]
    lossy = {step.operation for step in plan.steps if step.lossy}
    return PlanSummary(
        layout=plan.request.layout,
        gpus=plan.request.gpus,
        formats={
            "experts": str(formats.experts),
            "dense": str(formats.dense),
            "wo_a": str(formats.wo_a),
        },
        files={file.name: file.size for file in plan.files},
        bytes=plan.bytes,
        operations=dict(operations.most_common()),
        exactness={name: ROUNDED if name in lossy else EXACTNESS[name] for name in operations},
        rounded=len(rounded),
        calibratable=sum(spec.expert is not None and spec.format.kind != "fp4" for spec in rounded),
        workers=workers,
        peak_memory=peak,
        disk_needed=needed,
        disk_free=free,
    )
