"""``dsv4-quant convert``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from dsv4_quant.cli import conversion
from dsv4_quant.cli.calibration import Calibrate
from dsv4_quant.cli.conversion import DryRun, Gpus, MaxMemory, Move, Out, Overwrite, Src
from dsv4_quant.cli.options import Debug, Json, Quiet, Sums, SumsOption, Workers
from dsv4_quant.cli.report import Page, Recorded
from dsv4_quant.conversion.request import Request
from dsv4_quant.errors import UsageError
from dsv4_quant.formats.rules import ScaleRule


class Layout(StrEnum):
    """How the output lies in files."""

    hf = "hf"
    mp = "mp"


class Experts(StrEnum):
    """What the routed experts are stored in."""

    keep = "keep"
    fp4 = "fp4"
    fp8 = "fp8"
    bf16 = "bf16"


class Dense(StrEnum):
    """What every other quantised weight is stored in."""

    keep = "keep"
    fp8 = "fp8"
    bf16 = "bf16"


class Device(StrEnum):
    """What casts."""

    cpu = "cpu"
    cuda = "cuda"


class Rule(StrEnum):
    """How blocks that are rounded get their scales."""

    least_squares = "least-squares"
    max = "max"


def command(
    src: Src,
    out: Out,
    gpus: Gpus = None,
    layout: Annotated[
        Layout | None,
        typer.Option("--layout", help="hf: as published. mp: one file per GPU. --gpus means mp."),
    ] = None,
    experts: Annotated[
        Experts, typer.Option("--experts", help="The format of the routed experts.")
    ] = Experts.keep,
    dense: Annotated[
        Dense, typer.Option("--dense", help="The format of every other quantised weight.")
    ] = Dense.keep,
    lossy: Annotated[
        bool,
        typer.Option(
            "--lossy", help="Round what the new format cannot hold, and tell what that costs."
        ),
    ] = False,
    scale_rule: Annotated[
        Rule,
        typer.Option(
            "--scale-rule",
            help="With --lossy. least-squares: per block the power of two with the least error."
            " max: the smallest that reaches the largest value, as the published quantiser.",
        ),
    ] = Rule.least_squares,
    calibrate: Calibrate = None,
    report: Page = None,
    fingerprint: Recorded = None,
    dry_run: DryRun = False,
    device: Annotated[
        Device | None,
        typer.Option(
            "--device",
            help="What casts, and computes the forward passes of --calibrate and --fingerprint; the"
            " bytes are the same. cuda: a GPU, and the processor checks samples of its work. Tested"
            " in PyTorch on CPUs and in Triton's interpreter, on no GPU yet.  [default: cpu casts;"
            " a GPU computes if there is one and it passes a test]",
        ),
    ] = None,
    workers: Workers = None,
    max_memory: MaxMemory = "4GiB",  # type: ignore[assignment]
    overwrite: Overwrite = False,
    move: Move = False,
    sums: SumsOption = Sums.sha256,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint: another layout, GPU count or format of the experts.

    Every value stays what it is: a conversion that would change one is refused, and names the
    tensor and the tile, unless --lossy allows it: then every change is counted. The output comes
    with a manifest of what was proved and what it cost. After a crash or a full disk, the same
    command continues where the last one stopped.

    \b
    Examples:
      dsv4-quant convert DeepSeek-V4-Flash flash-fp8-mp8 --gpus 8 --experts fp8
      dsv4-quant convert deepseek-ai/DeepSeek-V4-Flash flash-bf16 --layout hf --experts bf16
      dsv4-quant convert DeepSeek-V4-Pro pro-mp16 --gpus 16 --dry-run
      dsv4-quant convert DeepSeek-V4-Flash-Base base-fp4 --layout hf --experts fp4 --lossy
    """
    conversion.run(
        src, out,
        make_request(gpus, layout, experts, dense, sums, lossy=lossy, rule=scale_rule),
        dry_run=dry_run, workers=workers, max_memory=max_memory, overwrite=overwrite, move=move,
        json=json, quiet=quiet, page=report, fingerprint=fingerprint, calibrate=calibrate,
        device=None if device is None else device.value,
    )  # fmt: skip


def make_request(
    gpus: int | None,
    layout: str | None,
    experts: Experts,
    dense: Dense,
    sums: Sums,
    *,
    lossy: bool = False,
    rule: Rule = Rule.least_squares,
) -> Request:
    """The request that the options make; --gpus implies mp."""
    chosen = ScaleRule(rule.value)
    if rule is not Rule.least_squares and not lossy:
        raise UsageError("--scale-rule says how to round, and without --lossy nothing is rounded")
    if layout == "hf":
        if gpus is not None:
            raise UsageError("--gpus splits over GPUs, --layout hf does not: give one of them")
        return Request("hf", 1, experts.value, dense.value, lossy, chosen, sums.value)
    if gpus is None:
        raise UsageError(
            "For how many GPUs? Neither --gpus N nor --layout hf was given",
            hint="--gpus N makes one file per GPU, --layout hf shards as published.",
        )
    return Request("mp", gpus, experts.value, dense.value, lossy, chosen, sums.value)
