"""What ``convert`` and ``repack`` share: their options, the run, and how its result is told."""

from __future__ import annotations

import re
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from dsv4_quant.checkpoint.manifest import MANIFEST, Manifest
from dsv4_quant.checkpoint.sums import LISTS
from dsv4_quant.cli import calibration
from dsv4_quant.cli import report as report_page
from dsv4_quant.cli.output import emit
from dsv4_quant.cli.progress import shown
from dsv4_quant.cli.sources import source as opened_source
from dsv4_quant.cli.tables import duration, size, table
from dsv4_quant.cli.together import here
from dsv4_quant.conversion.device import Device
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import ConvertReport, convert
from dsv4_quant.conversion.summary import PlanSummary, plan_conversion
from dsv4_quant.conversion.target import check_early
from dsv4_quant.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """``4GiB``, ``512M``, ``1.5g`` or bytes; units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write such as 4GiB or 512MiB.")
    return int(float(match[1]) * 1024 ** _POWER[match[2].upper()])


Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A checkpoint's folder, or a Hugging Face id (owner/name@revision)."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", metavar="N", min=1, help="One file per GPU for N GPUs (layout mp)."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the plan and its needs; write nothing. Of an id, read headers."
    ),
]
MaxMemory = Annotated[
    int,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        parser=parse_size,
        help="Bound of a process's peak memory, whatever the checkpoint's size.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace the checkpoint that OUT holds, once the new one is complete."
    ),
]

Move = Annotated[
    bool,
    typer.Option(
        "--move",
        help="For disks that cannot hold both: remove each file of SRC once everything made of it"
        " is on the disk and read back. SRC must have a manifest, which is checked first.",
    ),
]


def run(
    src: str,
    out: Path,
    request: Request,
    *,
    dry_run: bool,
    workers: int | None,
    max_memory: int,
    overwrite: bool,
    move: bool,
    json: str | None,
    quiet: bool,
    page: str | None = None,
    fingerprint: Path | None = None,
    device: Device | None = None,
    calibrate: Path | None = None,
) -> None:
    """Plans or converts, and tells the result. ``device``: what casts, and computes passes; None:
    the processor casts, and for passes a GPU is looked for."""
    casting, computing = device or "cpu", device or "auto"
    report_page.check(request, page, fingerprint, (src, out), json)
    calibration.check(request, calibrate, move=move, alone=here().size == 1)
    check_early(out, overwrite=overwrite)  # before the hub is asked
    with shown(quiet=quiet) as progress, opened_source(src, progress) as source:
        if calibrate is not None and source.arrivals is not None:
            raise UsageError(
                "--calibrate needs all of SRC twice, and an id arrives once",
                hint="Download it first, and give its folder.",
            )
        if dry_run or calibrate is not None or page is not None:  # before work of hours
            plan = plan_conversion(
                source.folder, out, request,
                workers=workers, max_memory=max_memory, overwrite=overwrite, move=move,
                arrivals=source.arrivals, device=casting,
            )  # fmt: skip
            report_page.check_plan(plan, page)
            calibration.check_plan(plan, calibrate, max_memory)
        if not dry_run:
            with calibration.factors(source.folder, calibrate, out, progress, computing) as factors:
                report = convert(
                    source.folder, out, request,
                    workers=workers, max_memory=max_memory, overwrite=overwrite, move=move,
                    arrivals=source.arrivals, progress=progress, team=here(), device=casting,
                    factors=factors,
                )  # fmt: skip
            judged = None
            if fingerprint is not None and here().is_first:
                judged = report_page.judge(report, fingerprint, progress, computing)
    if dry_run:
        emit(describe_plan(plan), {**asdict(plan), "fits": plan.fits}, json_to=json, quiet=quiet)
        raise typer.Exit(0 if plan.fits else 1)
    told = [describe(report), *report_page.closeness_lines(judged)]
    found = {**result(report), "closeness": None if judged is None else asdict(judged)}
    emit("\n".join(told), found, json_to=json, quiet=quiet)
    if page is not None and here().is_first:
        report_page.write_page(report, src, page, judged)


def describe_plan(plan: PlanSummary) -> str:
    """A plan for people."""
    gpus = f" for {plan.gpus} GPU{'s' if plan.gpus > 1 else ''}" if plan.layout == "mp" else ""
    rows = [[name, f"{count:,}", plan.exactness[name]] for name, count in plan.operations.items()]
    files = _few([[name, f"{held:,}", size(held)] for name, held in plan.files.items()])
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    facts = [
        f"layout   {plan.layout}{gpus}",
        f"formats  experts {plan.formats['experts']}, dense {plan.formats['dense']},"
        f" wo_a {plan.formats['wo_a']}",
        f"memory   {size(plan.peak_memory)} at most, with {plan.workers} threads",
        f"disk     {size(plan.disk_needed)} needed, {size(plan.disk_free)} free: {verdict}",
    ]
    return "\n".join(
        [
            *facts, "",
            table(["operation", "weights", "exactness"], rows, "<><"), "",
            table(["file", "bytes", "size"], files, "<>>"), "",
            "Nothing was written.",
        ]
    )  # fmt: skip


def _few(rows: list[list[str]], limit: int = 12) -> list[list[str]]:
    """Enough of a long list to see its shape."""
    if len(rows) <= limit:
        return rows
    return [*rows[:4], [f"({len(rows) - 6} more)", "", ""], *rows[-2:]]


def describe(report: ConvertReport) -> str:
    """A finished conversion for people."""
    manifest = report.manifest
    rate = report.bytes / max(report.seconds, 1e-9)
    resumed = report.resumed_bytes
    again = f" ({size(resumed)} of it by an earlier run)" if resumed else ""
    lines = [
        f"{report.out}: {size(report.bytes)}{again} in {duration(report.seconds)},"
        f" {size(rate)}/s, {len(manifest.tensors):,} weights in {manifest.layout} layout",
        f"value digest  {manifest.value_digest}",
        *proofs(manifest),
        *report_page.requantised(report),
        f"{MANIFEST} and {LISTS[manifest.hash_kind]} say what every file must be; `dsv4-quant"
        " verify` checks it.",
    ]
    return "\n".join(lines)


def proofs(manifest: Manifest) -> list[str]:
    """What the certificate says, a line per operation."""
    lines = []
    for operation, proof in manifest.certificate.items():
        if proof.spreads:
            lines.append(
                f"proved        {operation}: {proof.tiles:,} tiles of {proof.tensors:,} weights,"
                f" all exact; widest spread of scales 2**{max(proof.spreads)} of 2**14"
            )
        else:
            tiles = f"{proof.tiles:,} tiles of " if proof.tiles else ""
            lines.append(f"proved        {operation}: {tiles}{proof.tensors:,} weights, all exact")
    return lines


def result(report: ConvertReport) -> dict[str, object]:
    """A finished conversion for machines."""
    manifest = report.manifest
    return {
        "out": str(report.out),
        "bytes": report.bytes,
        "resumed_bytes": report.resumed_bytes,
        "seconds": round(report.seconds, 3),
        "layout": manifest.layout,
        "gpus": manifest.gpus,
        "formats": dict(manifest.formats),
        "tensors": len(manifest.tensors),
        "value_digest": manifest.value_digest,
        "certificate": {name: asdict(proof) for name, proof in manifest.certificate.items()},
        "requantised": _model_cost(manifest),
        "files": {name: record.to_json() for name, record in manifest.files.items()},
    }


def _model_cost(manifest: Manifest) -> dict[str, object] | None:
    """The model's figures; the manifest has those of every layer and weight."""
    if manifest.requantised is None:
        return None
    cost = manifest.requantised.model
    sqnr = cost.sqnr if isfinite(cost.sqnr) else None
    return {"rule": manifest.requantised.rule, "sqnr_db": sqnr, **cost.to_json()}
