"""``dsv4-quant digest``."""

from __future__ import annotations

from typing import Annotated

import typer

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.digest import model_digest
from dsv4_quant.checkpoint.digesting import digest_tensors
from dsv4_quant.cli.failure import report
from dsv4_quant.cli.options import At, Debug, Json, Quiet, Workers
from dsv4_quant.cli.output import emit
from dsv4_quant.cli.progress import shown
from dsv4_quant.cli.sources import found
from dsv4_quant.cli.together import here
from dsv4_quant.errors import NotANumberError


def command(
    path: At,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Print a digest and name for every weight instead.")
    ] = False,
    workers: Workers = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The value digest: one line that says which numbers a checkpoint holds.

    It is the same for the same numbers in any format, layout and number of GPUs, and different
    for any changed value, swapped weight or name. A NaN has no digest: exit code 1.

    \b
    Examples:
      dsv4-quant digest DeepSeek-V4-Flash
      diff <(dsv4-quant digest A --tensors) <(dsv4-quant digest B --tensors)
    """
    with (
        shown(quiet=quiet) as progress,
        Checkpoint.open(found(path, progress)) as checkpoint,
    ):
        progress.stage("hashing")
        try:
            digests = digest_tensors(checkpoint, workers=workers, progress=progress, team=here())
        except NotANumberError as wrong:
            hint = "`dsv4-quant verify` lists every weight that is damaged."
            report(NotANumberError(wrong.what, tensor=wrong.tensor, hint=hint), debug=debug)
            raise typer.Exit(1) from None
    whole = model_digest(digests)
    lines = [f"{digests[name]}  {name}" for name in sorted(digests)] if tensors else [whole]
    result = {"value_digest": whole, "tensors": dict(sorted(digests.items()))}
    emit("\n".join(lines), result, json_to=json, quiet=quiet)
