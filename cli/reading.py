"""What the commands share that read a checkpoint and judge it: which one, with how many threads."""

from __future__ import annotations

from typing import Annotated

import typer

At = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="A checkpoint's folder, or a Hugging Face id (owner/name@revision)."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", min=1, max=256, help="Threads; one per core if unsaid."),
]
