"""``dsv4-quant manifest``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.checkpoint.sums import LISTS
from dsv4_quant.cli.options import Debug, Json, Quiet, Sums, SumsOption, Workers
from dsv4_quant.cli.output import emit
from dsv4_quant.cli.progress import shown
from dsv4_quant.cli.verdict import describe, tell
from dsv4_quant.validators.pin import make_manifest


def command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint's folder.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a manifest that is there.")
    ] = False,
    sums: SumsOption = Sums.sha256,
    workers: Workers = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make manifest and SHA256SUMS for a checkpoint that has none, such as a fresh download.

    From then on `verify` can tell of every byte whether it is still what it was. Every value is
    judged first: a damaged folder gets no manifest, its findings are told, and the exit code is 1.

    \b
    Example:
      dsv4-quant manifest DeepSeek-V4-Flash
    """
    with shown(quiet=quiet) as progress:
        pinned = make_manifest(
            path, sums=sums.value, overwrite=overwrite, workers=workers, progress=progress
        )
    result = pinned.report.to_json()
    if pinned.manifest is None:
        tell(pinned.report, None)
        text = f"No manifest was written.\n{describe(pinned.report)}"
        emit(text, result | {"written": []}, json_to=json, quiet=quiet)
        raise typer.Exit(1)
    files = len(pinned.manifest.files)
    written = [MANIFEST, LISTS[sums.value]]
    text = f"{describe(pinned.report)}\n\n{path}/{' and '.join(written)} pin {files} files."
    emit(text, result | {"written": written}, json_to=json, quiet=quiet)
