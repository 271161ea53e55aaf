"""What a requantising run tells: the worst weights in the terminal, all of them in a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_quant.cli.options import writable
from dsv4_quant.cli.tables import filled
from dsv4_quant.errors import UsageError, WriteError
from dsv4_quant.progress import Progress

if TYPE_CHECKING:
    from dsv4_quant.conversion.request import Request
    from dsv4_quant.conversion.run import ConvertReport
    from dsv4_quant.conversion.summary import PlanSummary
    from dsv4_quant.model.on_device import Device
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


def check(
    request: Request,
    page: str | None,
    fingerprint: Path | None,
    folders: tuple[str, Path],
    json: str | None,
) -> None:
    """Raises UsageError for options that would do nothing, or a page that would replace a file."""
    if page is not None and not request.lossy:
        raise UsageError(
            "--report tells what rounding cost, and without --lossy nothing is rounded"
        )
    if fingerprint is not None and page is None:
        raise UsageError(
            "--fingerprint adds to the page of --report, and no page was asked for",
            hint="`dsv4-quant verify OUT --fingerprint FILE` compares without a page.",
        )
    if page is not None:
        _check_place(Path(page), folders, json)
    if fingerprint is not None:
        from dsv4_quant.fingerprints.parse import read_fingerprint  # torch: only where it is used

        read_fingerprint(fingerprint)  # before hours of work


def _check_place(page: Path, folders: tuple[str, Path], json: str | None) -> None:
    place = page.resolve()
    for folder in (Path(one) for one in folders):
        if place.is_relative_to(folder.resolve()):
            raise UsageError(
                "--report would write into a checkpoint's folder",
                file=page,
                hint="Choose a place beside it.",
            )
    if page.exists() and page.suffix.lower() not in (".html", ".htm"):
        raise UsageError("--report would replace a file that is no page", file=page)
    if json is not None and json != "-" and Path(json).resolve() == place:
        raise UsageError("--report and --json name the same file", file=page)


def check_plan(plan: PlanSummary, page: str | None) -> None:
    """Raises UsageError where there will be nothing to report."""
    if page is not None and not plan.rounded:
        raise UsageError(
            "Nothing would be rounded, so there is nothing to report: every format stays as it is,"
            " or is made exactly"
        )


def requantised(report: ConvertReport) -> list[str]:
    """Lines for the terminal; none where nothing may have been rounded."""
    held = report.manifest.requantised
    if held is None:
        return []
    from dsv4_quant.cli.requantised import describe
    from dsv4_quant.reports.recast import recasts

    lines = [describe(recasts(report.before, report.after, held.tensors))]
    if held.calibration is not None:
        said = held.calibration
        lines.append(
            f"calibrated    {said['weights_moved']:,} of {len(held.tensors):,} weights, in"
            f" {said['rows_moved']:,} rows; the others stay plain: too few tokens, or held-out"
            f" ones say so ({said['unreached']:,} of {said['experts']:,} experts saw none)"
        )
    return lines


def judge(
    report: ConvertReport, fingerprint: Path, progress: Progress, device: Device
) -> Closeness | None:
    """How far OUT's answers are from those recorded. Raises UsageError for another checkpoint's.

    ``device``: what computes the forward pass.
    """
    from dsv4_quant.checkpoint import Checkpoint
    from dsv4_quant.fingerprints.parse import read_fingerprint
    from dsv4_quant.reports.closeness import closeness
    from dsv4_quant.validators.forward import check_fingerprint

    recorded = read_fingerprint(fingerprint)
    of = None if recorded.measured is None else recorded.measured.value_digest
    source = report.manifest.source_digest
    if of is not None and of != source:
        raise UsageError(
            f"The fingerprint is of other weights (value digest {of[:16]}...) than SRC's"
            f" ({source[:16]}...)",
            file=fingerprint,
            hint=f"{report.out} is complete. Give a fingerprint of SRC.",
        )
    with Checkpoint.open(report.out) as ckpt:
        verdict = check_fingerprint(ckpt, recorded, gate="lossy", device=device, progress=progress)
    if verdict.comparison is None or verdict.gate is None:
        return None
    return closeness(verdict.comparison, verdict.gate, verdict.why)


def closeness_lines(judged: Closeness | None) -> list[str]:
    """For the terminal: what the gate says, and why."""
    if judged is None:
        return []
    kl = "" if judged.kl is None else f", KL {judged.kl:.3g} nats (at most {judged.kl_limit:g})"
    same = "" if judged.top1 is None else (
        f", likeliest token the same at {judged.top1:.1%} of the {judged.clear} spots that have a"
        f" clear one"
        f" (at least {judged.top1_limit:.0%})"
    )  # fmt: skip
    verdict = "holds" if judged.holds else "DOES NOT HOLD"
    return [filled(f"gate {judged.gate} {verdict}{kl}{same}", "answers       ")]


def write_page(report: ConvertReport, src: str, file: str, judged: Closeness | None) -> None:
    """The page, whole or not at all. Raises WriteError; the output is complete by then."""
    from dsv4_quant.reports.page import Run, page
    from dsv4_quant.reports.recast import recasts

    held, manifest = report.manifest.requantised, report.manifest
    assert held is not None, "a plan that rounds nothing was refused"
    rows = recasts(report.before, report.after, held.tensors)
    more = {key: str(value) for key, value in (held.calibration or {}).items()}
    out, digests = str(report.out), (manifest.source_digest, manifest.value_digest)
    run = Run(src, out, held.rule, *digests, more)
    text = page(rows, run, judged, exponents=held.model.exponents)
    new = Path(f"{file}.new")
    try:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")
        new.replace(file)
    except OSError as error:
        raise WriteError(
            f"The page cannot be written: {error.strerror}",
            file=file,
            hint="The output is complete; the same command with another FILE makes the page.",
        ) from None
