"""``--calibrate``: what experts see, found out before a conversion that rounds them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_quant.cli.tokens import read_tokens
from dsv4_quant.conversion.request import Request
from dsv4_quant.errors import UsageError, WriteError
from dsv4_quant.progress import Progress

if TYPE_CHECKING:
    from dsv4_quant.calibration import Calibration
    from dsv4_quant.conversion.summary import PlanSummary
    from dsv4_quant.model.on_device import Device

LEAST_MEMORY = 1 << 30
"""Room for a few factors of V4-Pro's width beside the conversion; the forward pass is not in it."""

Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--calibrate",
        metavar="T.json",
        exists=True,
        dir_okay=False,
        help="With --lossy: run these prompts (a list of token-id lists) through SRC first, and"
        " round the experts so that their outputs, not their weights, change least. Takes a forward"
        " pass, room beside OUT, and for V4-Flash hours.",
    ),
]


def check(request: Request, tokens: Path | None, *, move: bool, alone: bool) -> None:
    """Raises UsageError for options that do not go together."""
    if tokens is None:
        return
    if not request.lossy:
        raise UsageError("--calibrate chooses how to round, and without --lossy nothing is rounded")
    if request.experts not in ("fp4", "fp8"):
        raise UsageError("--calibrate rounds experts: say --experts fp4 or --experts fp8")
    if move:
        raise UsageError("--calibrate and --move: a run that is continued could not look again")
    if not alone:
        raise UsageError("--calibrate works in one process")


def check_plan(plan: PlanSummary, tokens: Path | None, max_memory: int) -> None:
    """Raises UsageError, before a pass that may take hours, where it would be for nothing."""
    if tokens is None:
        return
    if not plan.calibratable:
        raise UsageError(
            "--calibrate has nothing to choose: no expert would be rounded, or only FP4 ones, which"
            " keep the scales and codes that FP8 can hold"
        )
    if max_memory < LEAST_MEMORY:
        raise UsageError(
            f"--max-memory {max_memory >> 20} MiB is too little to calibrate with",
            hint=f"It needs at least {LEAST_MEMORY >> 20} MiB.",
        )


@contextmanager
def factors(
    source: Path, tokens: Path | None, out: Path, progress: Progress, device: Device
) -> Iterator[Calibration | None]:
    """The calibration, while its files are there: beside OUT, and removed at the end.

    ``device``: what computes the forward pass.
    """
    if tokens is None:
        yield None
        return
    from dsv4_quant.calibration import collect
    from dsv4_quant.checkpoint import Checkpoint

    prompts = read_tokens(tokens)
    folder = out.parent / f".{out.name}.calibration-{os.getpid()}"
    try:
        _remove_left(out)
        folder.mkdir(parents=True)
    except OSError as error:
        raise WriteError(f"No room for calibrating: {error.strerror}", file=folder) from None
    try:
        with Checkpoint.open(source) as ckpt:
            found = collect(ckpt, prompts, folder, device=device, progress=progress)
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left(out: Path) -> None:
    """What runs left that were killed: their process is gone."""
    for left in out.parent.glob(f".{out.name}.calibration-*"):
        if not Path(f"/proc/{left.name.rpartition('-')[2]}").exists():
            shutil.rmtree(left, ignore_errors=True)
