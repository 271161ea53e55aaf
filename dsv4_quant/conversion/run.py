"""One conversion from beginning to end: validate all, stream, finish.

Until the last moment everything lies in ``OUT/.dsv4-partial``. Then the weight files move to their
places, after them the files that came along, the index and the configs, and last the manifest and
SHA256SUMS. A folder with a manifest is complete; one without is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint.manifest import Manifest
from dsv4_quant.checkpoint.panels import usable_cores
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.conversion.budget import budget
from dsv4_quant.conversion.casts import Casts
from dsv4_quant.conversion.device import Device, casts_on
from dsv4_quant.conversion.journal import freed_headers
from dsv4_quant.conversion.meeting import meet
from dsv4_quant.conversion.moving import check_movable, rehearse
from dsv4_quant.conversion.plan import make_plan
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.running import Run
from dsv4_quant.conversion.source import take_stamps
from dsv4_quant.conversion.target import (
    check_room,
    check_separate,
    same_plan,
    stated_digests,
)
from dsv4_quant.errors import (
    UsageError,
    WriteError,
)
from dsv4_quant.progress import Progress
from dsv4_quant.team import Team

if TYPE_CHECKING:
    from dsv4_quant.conversion.calibrated import Factors
    from dsv4_quant.hub.arrivals import Arrivals


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a finished conversion did."""

    out: Path
    manifest: Manifest
    bytes: int
    resumed_bytes: int
    seconds: float
    before: Mapping[str, TensorSpec]
    """The source's weights by name: how they were stored."""
    after: Mapping[str, TensorSpec]
    """The output's."""


def convert(
    src: str | Path,
    out: str | Path,
    request: Request,
    *,
    workers: int | None = None,
    max_memory: int = 4 << 30,
    overwrite: bool = False,
    move: bool = False,
    arrivals: Arrivals | None = None,
    progress: Progress | None = None,
    team: Team | None = None,
    device: Device = "cpu",
    factors: Factors | None = None,
) -> ConvertReport:
    """Converts a checkpoint folder. Continues by itself what an earlier run left unfinished.

    With ``move`` each source file is removed once what was made of it is safe (``moving``). Where
    ``src`` holds only headers, ``arrivals`` brings the data (``hub.headers.opened``).

    Where OUT already is this conversion, complete and of the same source, that is checked byte by
    byte and value by value, and nothing is written.

    The processes of a ``team`` share the output's files; ``workers`` and ``max_memory`` are of each
    of them. All get the report.

    ``device`` casts; it changes no byte. Where values are only copied, it has nothing to do.
    ``factors`` choose the codes of experts that are rounded (``calibrated``).

    Raises a Dsv4Error subclass; the output is then either absent or visibly unfinished.
    """
    began = time.monotonic()
    team, target = team or Team(), Path(out)
    casts = casts_on(device, team.local)
    if factors is not None:
        request = replace(request, calibration=factors.describe())
        casts = partial(_calibrated, casts, factors)
    progress = team.watched(progress)
    freed = freed_headers(target) if team.is_first else None
    if team.size > 1 and (move or freed is not None or arrivals is not None):
        raise UsageError("--move is for one process: several need a source that stays as it is")
    stamps = team.lead(lambda: take_stamps(src) if arrivals is None else arrivals.stamps)
    with Checkpoint.open(src, freed=freed, arrivals=arrivals) as source:
        progress.stage("planning")
        plan = make_plan(source, request)
        team.agree(lambda: same_plan(plan), "checkpoint, or other options")
        sharing = team.sharing if team.size > 1 else None
        threads = workers or usable_cores(sharing or 1)
        limits = budget(
            plan,
            workers=workers,
            max_memory=max_memory - (factors.reserve(max_memory // 2, threads) if factors else 0),
            sharing=sharing,
            device=device,
        )
        stated = stated_digests(source)
        check_separate(source.root, target)
        if move:
            check_movable(plan, stated)
        team.lead(lambda: check_room(plan, target, overwrite=overwrite, move=move))
        if move and freed is None:
            rehearse(plan, stated, limits, progress)
        work = meet(team, target)
        try:
            run = Run(team, work, plan, limits, stamps, stated, progress, move, casts)
            manifest, done = run.all(overwrite=overwrite)
        except OSError as error:
            raise WriteError(
                f"The system refused: {error.strerror or error}",
                file=error.filename2 or error.filename or target,
                hint="Run the same command again when the cause is gone: it continues from there.",
            ) from None
        finally:
            work.close()
    seconds = time.monotonic() - began
    before, after = plan.source.specs, plan.catalogue.specs
    return ConvertReport(target, manifest, plan.bytes, done, seconds, before, after)


def _calibrated(plain: Callable[[], Casts], factors: Factors) -> Casts:
    from dsv4_quant.conversion.calibrated import Calibrated  # kernels that only rounding needs

    return Calibrated(plain(), factors)
