"""``dsv4-quant synth``."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsv4_quant.cli.options import Debug, Json, Quiet
from dsv4_quant.cli.output import emit
from dsv4_quant.cli.progress import shown
from dsv4_quant.cli.tables import size
from dsv4_quant.synthesis import synth


class Experts(StrEnum):
    """What the routed experts are stored in."""

    fp4 = "fp4"
    fp8 = "fp8"
    bf16 = "bf16"


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    config: Annotated[
        str,
        typer.Option(
            metavar="tiny|tiny-base|CONFIG.json",
            help="tiny has FP4 experts, tiny-base FP8 experts and F32 scales; or the config.json"
            " of a published checkpoint.",
        ),
    ] = "tiny",
    experts: Annotated[
        Experts | None, typer.Option(help="The experts' format, if not the config's.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="Only the model's first N layers.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Other seeds give other values.")] = 0,
    shards: Annotated[
        int | None, typer.Option(metavar="N", help="Write N files instead of one per layer.")
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a seeded random checkpoint in the published format.

    Names, dtypes, shapes, shards, index and config are those of a published checkpoint; the same
    arguments give the same bytes on every machine. Nothing is left of a run that fails.

    \b
    Examples:
      dsv4-quant synth tiny
      dsv4-quant synth flash-2 --config V4-Flash/config.json --layers 2
    """
    with shown(quiet=quiet) as progress:
        report = synth(
            out,
            config=config,
            experts=None if experts is None else experts.value,
            layers=layers,
            seed=seed,
            shards=shards,
            progress=progress,
        )
    files = "1 shard" if report.shards == 1 else f"{report.shards} shards"
    text = (
        f"{report.path}: {report.tensors:,} tensors, {size(report.bytes)} in {files};"
        f" experts {report.experts}, dense {report.dense}, seed {report.seed}"
    )
    emit(text, asdict(report), json_to=json, quiet=quiet)
