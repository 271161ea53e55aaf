"""What a requantising run tells: the worst weights in the terminal, all of them in a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_quant.cli.options import writable
from dsv4_quant.errors import UsageError, WriteError
from dsv4_quant.progress import Progress

if TYPE_CHECKING:
    from dsv4_quant.conversion.request import Request
    from dsv4_quant.conversion.run import ConvertReport
    from dsv4_quant.reports.closeness import Closeness

Page = Annotated[
    str | None,
    typer.Option(
        "--report",
        metavar="FILE",
        callback=writable,
        help="With --lossy: write what it cost as one self-contained HTML page.",
    ),
]
Recorded = Annotated[
    Path | None,
    typer.Option(
        "--fingerprint",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="With --report: also run OUT on the prompts of this fingerprint (of SRC), and show"
        " how far its answers are from those recorded.",
    ),
]


def check(request: Request, page: str | None, fingerprint: Path | None) -> None:
    """Raises UsageError for options that would do nothing."""
    if page is not None and not request.lossy:
        raise UsageError(
            "--report tells what rounding cost, and without --lossy nothing is rounded"
        )
    if fingerprint is not None and page is None:
        raise UsageError(
            "--fingerprint adds to the page of --report, and no page was asked for",
            hint="`dsv4-quant verify OUT --fingerprint FILE` compares without a page.",
        )
    if fingerprint is not None:
        from dsv4_quant.fingerprints.parse import read_fingerprint  # torch: only where it is used

        read_fingerprint(fingerprint)  # before hours of work


def requantised(report: ConvertReport) -> list[str]:
    """Lines for the terminal; none where nothing may have been rounded."""
    held = report.manifest.requantised
    if held is None:
        return []
    from dsv4_quant.cli.requantised import describe
    from dsv4_quant.reports.recast import recasts

    return [describe(recasts(report.before, report.after, held.tensors))]


def write_page(
    report: ConvertReport, src: str, file: str, fingerprint: Path | None, progress: Progress
) -> None:
    """The page; with a fingerprint the forward pass runs first. Raises WriteError."""
    from dsv4_quant.reports.page import Run, page
    from dsv4_quant.reports.recast import recasts

    held, manifest = report.manifest.requantised, report.manifest
    rows = [] if held is None else recasts(report.before, report.after, held.tensors)
    if held is None or not rows:
        raise UsageError(
            "Nothing was rounded, so there is nothing to report: every format stayed as it was",
            hint="The output is complete.",
        )
    more = {key: str(value) for key, value in (held.calibration or {}).items()}
    run = Run(src, str(report.out), held.rule, None, manifest.value_digest, more)
    judged = None if fingerprint is None else _judged(report.out, fingerprint, progress)
    text = page(rows, run, judged, exponents=held.model.exponents)
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise WriteError(f"The page cannot be written: {error.strerror}", file=file) from None


def _judged(out: Path, fingerprint: Path, progress: Progress) -> Closeness | None:
    from dsv4_quant.checkpoint import Checkpoint
    from dsv4_quant.reports.closeness import closeness
    from dsv4_quant.validators.forward import check_fingerprint

    with Checkpoint.open(out) as ckpt:
        verdict = check_fingerprint(ckpt, fingerprint, gate="lossy", progress=progress)
    if verdict.comparison is None or verdict.gate is None:
        return None
    return closeness(verdict.comparison, verdict.gate, verdict.why)
