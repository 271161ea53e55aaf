"""``dsv4-quant verify``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from dsv4_quant.cli.options import At, Debug, Json, Quiet, Workers, writable
from dsv4_quant.cli.output import emit
from dsv4_quant.cli.progress import shown
from dsv4_quant.cli.verdict import describe, tell
from dsv4_quant.hub import resolve
from dsv4_quant.validators.verify import verify


class Level(StrEnum):
    """How thorough; each includes those before it."""

    structure = "structure"
    checksums = "checksums"
    values = "values"


def command(
    path: At,
    level: Annotated[
        Level,
        typer.Option(
            "--level",
            help="structure: headers, index, configs. checksums: every byte against the manifest."
            " values: every number.",
        ),
    ] = Level.values,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="SRC",
            help="A folder or id, in any layout and format, that must hold the same values.",
        ),
    ] = None,
    junit: Annotated[
        str | None,
        typer.Option(
            "--junit", metavar="FILE", callback=writable, help="Write the findings as JUnit XML."
        ),
    ] = None,
    workers: Workers = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Judge a checkpoint: is it whole, is it what it says, are its numbers sound?

    All findings are told, each with file and tensor, what was expected and what was found. Errors
    end with exit code 1; warnings are worth a look and do not. On GitHub Actions the findings are
    annotations, too.

    \b
    Examples:
      dsv4-quant verify DeepSeek-V4-Flash --level structure
      dsv4-quant verify flash-fp8-mp8 --junit report.xml
      dsv4-quant verify flash-fp8-mp8 --against DeepSeek-V4-Flash
    """
    with shown(quiet=quiet) as progress:
        source = None if against is None else resolve(against, progress=progress)
        report = verify(
            resolve(path, progress=progress), level.value,
            against=source, workers=workers, progress=progress,
        )  # fmt: skip
    tell(report, junit)
    emit(describe(report), report.to_json(), json_to=json, quiet=quiet)
    if not report.holds:
        raise typer.Exit(1)
