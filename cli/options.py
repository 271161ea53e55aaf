"""Options and arguments that commands share.

Every command takes these last: ``json: Json = None, quiet: Quiet = False, debug: Debug = False``
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """What computes the products of a forward pass."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Sums(StrEnum):
    """Which hash the files get."""

    sha256 = "sha256"
    blake3 = "blake3"


def writable(value: str | None) -> str | None:
    """A result must not be lost after hours of work to a folder that is not there."""
    if value is not None and value != "-":
        path = Path(value)
        if path.is_dir() or not path.parent.is_dir():
            raise typer.BadParameter(f"{value} cannot be written: no such folder, or it is one.")
    return value


Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=writable,
        help="Write the result as JSON; '-' for standard output, which then holds nothing else.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        max=256,
        help="Threads of a process; its share of the cores if unsaid.",
    ),
]
Computes = Annotated[
    Device,
    typer.Option(
        "--device",
        help="What computes the products of the forward pass; the bits are the same. auto: a GPU if"
        " there is one and it passes a test, else the processor, which also goes on where it fails."
        " cuda: a GPU. The processor checks samples of its work. Tested in PyTorch on CPUs and in"
        " Triton's interpreter, on no GPU yet.",
    ),
]
At = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="A checkpoint's folder, or a Hugging Face id (owner/name@revision)."
    ),
]
SumsOption = Annotated[
    Sums,
    typer.Option(
        "--sums",
        help="sha256: SHA256SUMS, for `sha256sum -c`. blake3: B3SUMS, for `b3sum -c`; four times"
        " as fast.",
    ),
]
