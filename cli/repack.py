"""``dsv4-quant repack``."""

from __future__ import annotations

from typing import Annotated

import typer

from dsv4_quant.cli import conversion
from dsv4_quant.cli.conversion import DryRun, Gpus, MaxMemory, Move, Out, Overwrite, Src
from dsv4_quant.cli.convert import Dense, Experts, Layout, make_request
from dsv4_quant.cli.options import Debug, Json, Quiet, Sums, SumsOption, Workers


def command(
    src: Src,
    out: Out,
    gpus: Gpus = None,
    layout: Annotated[
        Layout | None, typer.Option("--layout", help="hf: back to one checkpoint as published.")
    ] = None,
    dry_run: DryRun = False,
    workers: Workers = None,
    max_memory: MaxMemory = "4GiB",  # type: ignore[assignment]
    overwrite: Overwrite = False,
    move: Move = False,
    sums: SumsOption = Sums.sha256,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Split a checkpoint over another number of GPUs, or put it back together.

    No value changes, and no format does, but for wo_a: one-file-per-GPU layouts hold it in BF16 as
    the published converter writes it, and on the way back it becomes FP8 again, exactly.

    \b
    Examples:
      dsv4-quant repack flash-mp8 flash-mp4 --gpus 4
      dsv4-quant repack flash-mp8 flash-hf --layout hf
    """
    conversion.run(
        src, out, make_request(gpus, layout, Experts.keep, Dense.keep, sums),
        dry_run=dry_run, workers=workers, max_memory=max_memory, overwrite=overwrite, move=move,
        json=json, quiet=quiet,
    )  # fmt: skip
