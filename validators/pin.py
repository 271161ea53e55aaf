"""Makes manifest and SHA256SUMS for a checkpoint that has none, so that it can be checked later.

Nothing is pinned that does not hold: a folder whose structure or values are wrong gets no manifest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dsv4_quant import __version__
from dsv4_quant.checkpoint.manifest import MANIFEST, FileRecord, Manifest, TensorRecord
from dsv4_quant.checkpoint.manifest import sums as sums_of
from dsv4_quant.checkpoint.sidecars import identity
from dsv4_quant.checkpoint.sums import LISTS, HashKind, new_hash
from dsv4_quant.durable import sync_folder
from dsv4_quant.errors import UsageError, WriteError
from dsv4_quant.progress import Progress
from dsv4_quant.validators.report import Report
from dsv4_quant.validators.verify import Judgement, judge

PINS = (MANIFEST, *LISTS.values())


@dataclass(frozen=True, slots=True)
class Pinned:
    """The verdict, and the manifest that was written if it is good."""

    report: Report
    manifest: Manifest | None


def make_manifest(
    path: str | Path,
    *,
    sums: HashKind = "sha256",
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Pinned:
    """Judges every value of a folder, hashes every file, and writes both files if all holds.

    ``sums``: the kind of the hashes, in the manifest and in SHA256SUMS or B3SUMS.

    Raises UsageError where a manifest exists already (unless ``overwrite``), UnreadableError where
    the folder is no checkpoint, WriteError where the files cannot be written.
    """
    root = Path(path)
    for name in PINS:
        if not overwrite and os.path.lexists(root / name):
            raise UsageError(
                "The folder has one already",
                file=root / name,
                hint="`dsv4-quant verify` checks it; --overwrite replaces it.",
            )
    judged = judge(root, "values", workers=workers, progress=progress, to_pin=sums)
    if not judged.report.holds:
        return Pinned(judged.report, None)
    manifest = _manifest(judged, sums)
    content = manifest.to_json()
    hash = new_hash(sums)
    hash.update(content)
    record = FileRecord.of(len(content), sums, hash.hexdigest())
    try:
        _write(root / MANIFEST, content)
        _write(root / LISTS[sums], sums_of({**manifest.files, MANIFEST: record}))
        for kind in LISTS.keys() - {sums}:  # it speaks of the manifest that has been replaced
            (root / LISTS[kind]).unlink(missing_ok=True)
    except OSError as wrong:
        raise WriteError(
            f"The manifest cannot be written: {wrong.strerror}", file=wrong.filename or root
        ) from None
    return Pinned(judged.report, manifest)


def _manifest(judged: Judgement, sums: HashKind) -> Manifest:
    subject = judged.subject
    assert subject.config is not None and subject.catalogue is not None
    held, layout, gpus = subject.catalogue.formats, subject.folder.layout, subject.folder.gpus
    return Manifest(
        tool=f"dsv4-quant {__version__}",
        layout=layout,
        gpus=gpus,
        formats={
            "experts": str(held.experts),
            "dense": str(held.dense),
            "wo_a": str(held.wo_a),
        },
        files={
            name: FileRecord.of(size, sums, judged.hashes[name][sums])
            for name, size in judged.sizes.items()
            if name not in PINS
        },
        tensors={
            name: TensorRecord(str(spec.format), judged.digests[name])
            for name, spec in subject.catalogue.specs.items()
        },
        source={
            "layout": layout,
            "gpus": gpus,
            "identity": identity(subject.folder, subject.config),
        },
    )


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
