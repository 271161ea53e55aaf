"""``dsv4-quant verify``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsv4_quant.cli.options import At, Computes, Debug, Device, Json, Quiet, Workers, writable
from dsv4_quant.cli.output import emit
from dsv4_quant.cli.progress import shown
from dsv4_quant.cli.sources import found, source
from dsv4_quant.cli.together import here
from dsv4_quant.cli.verdict import describe, tell
from dsv4_quant.errors import UsageError
from dsv4_quant.validators.verify import verify


class Level(StrEnum):
    """How thorough; each includes those before it."""

    structure = "structure"
    checksums = "checksums"
    values = "values"
    forward = "forward"


class Gate(StrEnum):
    """How equal the model's answers must be."""

    bit = "bit"
    numeric = "numeric"
    lossy = "lossy"


def command(
    path: At,
    level: Annotated[
        Level | None,
        typer.Option(
            "--level",
            help="structure: headers, index, configs. checksums: every byte against the manifest."
            " values: every number. forward: what the model says; needs --fingerprint."
            "  [default: values, or forward with --fingerprint]",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="SRC",
            help="A folder or id, in any layout and format, that must hold the same values; or,"
            " of weights that were requantised, those that the manifest says they were made of.",
        ),
    ] = None,
    fingerprint: Annotated[
        Path | None,
        typer.Option(
            "--fingerprint",
            metavar="F.json",
            help="What `dsv4-quant fingerprint` recorded of the source, or of a served model.",
        ),
    ] = None,
    gate: Annotated[
        Gate | None,
        typer.Option(
            "--gate",
            help="bit: equal bits. numeric: equal but for rounding. lossy: requantised weights."
            "  [default: the strictest that this machine and the fingerprint's allow; lossy where"
            " the manifest says that weights were rounded from what the fingerprint is of]",
        ),
    ] = None,
    junit: Annotated[
        str | None,
        typer.Option(
            "--junit", metavar="FILE", callback=writable, help="Write the findings as JUnit XML."
        ),
    ] = None,
    workers: Workers = None,
    device: Computes = Device.auto,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Judge a checkpoint: is it whole, is it what it says, are its numbers sound?

    All findings are told, each with file and tensor, what was expected and what was found. Errors
    end with exit code 1; warnings are worth a look and do not. On GitHub Actions the findings are
    annotations, too.

    Of weights that `convert --lossy` rounded, --against compares the source's value digest with the
    one in the manifest, and measures the error that the manifest states.

    \b
    Examples:
      dsv4-quant verify DeepSeek-V4-Flash --level structure
      dsv4-quant verify flash-fp8-mp8 --junit report.xml
      dsv4-quant verify flash-fp8-mp8 --against DeepSeek-V4-Flash
      dsv4-quant verify base-fp4 --against DeepSeek-V4-Flash-Base
      dsv4-quant verify flash-fp8-mp8 --fingerprint flash.json
    """
    if gate is not None and fingerprint is None:
        raise UsageError("--gate goes with --fingerprint")
    chosen = level or (Level.values if fingerprint is None else Level.forward)
    with shown(quiet=quiet) as progress, ExitStack() as stack:
        other = None if against is None else found(against, progress)
        if chosen is Level.structure:  # of an id only headers
            folder = stack.enter_context(source(path, progress)).folder
        else:
            folder = found(path, progress)
        report = verify(
            folder, chosen.value,
            against=other, fingerprint=fingerprint, gate=None if gate is None else gate.value,
            workers=workers, device=device.value, progress=progress, team=here(),
        )  # fmt: skip
    report = replace(report, path=path)
    if here().is_first:
        tell(report, junit)
    emit(describe(report), report.to_json(), json_to=json, quiet=quiet)
    if not report.holds:
        raise typer.Exit(1)
