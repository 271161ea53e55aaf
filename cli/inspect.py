"""``dsv4-quant inspect``."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import typer

from dsv4_quant.cli.options import At, Debug, Json, Quiet
from dsv4_quant.cli.output import emit
from dsv4_quant.cli.progress import shown
from dsv4_quant.cli.tables import size, table
from dsv4_quant.hub import opened
from dsv4_quant.inspection import Inspection, Split, inspect


def command(
    path: At,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="N", help="Show what each of N GPUs will hold."),
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What a checkpoint holds, from its headers alone.

    Layout, release, formats, tensors and bytes by role and dtype. With --gpus also the bytes that
    each GPU will hold, for every format of the experts. Both layouts; any size takes seconds. Of
    an id only headers and small files are fetched, a few MB.

    \b
    Examples:
      dsv4-quant inspect DeepSeek-V4-Flash --gpus 4
      dsv4-quant inspect deepseek-ai/DeepSeek-V4-Pro
    """
    with shown(quiet=quiet) as progress, opened(path, progress=progress) as source:
        found = replace(inspect(source.folder, gpus), path=path)
    emit(describe(found), asdict(found), json_to=json, quiet=quiet)


def describe(found: Inspection) -> str:
    """The report for people."""
    release = f"{found.release} ({found.note})" if found.note else found.release
    split = f", split over {found.gpus} GPUs" if found.layout == "mp" else ""
    files = "1 file" if found.files == 1 else f"{found.files} files"
    facts = [
        ["release", release],
        ["layout", f"{found.layout}, {files}{split}"],
        ["experts", found.experts],
        ["dense", found.dense],
        ["wo_a", found.wo_a],
        ["tensors", f"{found.tensors:,}"],
        ["bytes", f"{found.bytes:,} ({size(found.bytes)})"],
    ]
    rows = [[p.role, p.dtype, f"{p.tensors:,}", size(p.bytes)] for p in found.parts]
    parts = table(["role", "dtype", "tensors", "size"], rows, "<<>>")
    text = "\n".join(f"{name:9}{value}" for name, value in facts) + f"\n\n{parts}"
    return text if found.split is None else f"{text}\n\n{_describe_split(found.split)}"


def _describe_split(split: Split) -> str:
    rows = [
        [
            f"{one.experts} (as it is)" if one.is_held else one.experts,
            f"{one.tensors:,}",
            f"{one.bytes:,}",
            size(one.bytes),
        ]
        for one in split.per_gpu
    ]
    held = table(["experts", "tensors", "bytes", "size"], rows, "<>>>")
    return f"Each of {split.gpus} GPUs will hold, by the format of the experts:\n\n{held}"
