"""The files of a checkpoint's folder: all but the hidden ones."""

from __future__ import annotations

import os
from pathlib import Path

from dsv4_quant.checkpoint.folder import check_inside
from dsv4_quant.checkpoint.sidecars import PICKLES
from dsv4_quant.errors import Dsv4Error, UnreadableError
from dsv4_quant.strict_json import clip
from dsv4_quant.validators.report import Finding, error, warning

UNFINISHED = ".dsv4-partial"
"""Where a conversion works until its last moment."""

MAX_FILES = 100_000


def present_files(root: Path) -> tuple[dict[str, int], list[Finding]]:
    """Sizes by name (with /), sorted, and a finding for each that is no file of this folder.

    Raises UnreadableError for a folder of more than 100,000 files.
    """
    sizes: dict[str, int] = {}
    findings: list[Finding] = []
    seen = 0
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        seen += len(files)
        if seen > MAX_FILES:
            raise UnreadableError(f"The folder holds more than {MAX_FILES:,} files", file=root)
        for file in sorted(file for file in files if not file.startswith(".")):
            path = Path(folder) / file
            try:
                check_inside(root, path)
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
            except (Dsv4Error, OSError) as wrong:
                findings.append(_stranger(root, path, wrong))
    return sizes, findings


def _stranger(root: Path, path: Path, wrong: Dsv4Error | OSError) -> Finding:
    what = wrong.what if isinstance(wrong, Dsv4Error) else str(wrong.strerror)
    name = clip(path.relative_to(root).as_posix(), 255)
    return error("files", what, "Replace it by the file that it should be.", file=name)


def judge_presence(root: Path, sizes: dict[str, int]) -> list[Finding]:
    """What lies in the folder and should not."""
    findings = [
        warning("files", "a pickle", "Loading one runs the code that it holds; no loader of this"
                " model needs it.", file=clip(name, 255))
        for name in sizes
        if name.endswith(PICKLES)
    ]  # fmt: skip
    if (root / UNFINISHED).exists():
        findings.append(
            error("files", "an unfinished conversion", "Run the same convert command again: it"
                  " continues.", file=UNFINISHED)
        )  # fmt: skip
    return findings
