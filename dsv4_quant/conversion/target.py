"""OUT before a conversion: whether it may be written to, has room, or holds this very output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsv4_quant import __version__
from dsv4_quant.checkpoint.folder import INDEX, is_weight_file
from dsv4_quant.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    read_manifest,
    sums,
)
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.checkpoint.sidecars import carried_files, identity
from dsv4_quant.checkpoint.sums import LISTS, HashKind, new_hash
from dsv4_quant.conversion.arriving import digest_source, incoming_room
from dsv4_quant.conversion.configs import CONFIG, INFERENCE_CONFIG, small_files
from dsv4_quant.conversion.files import prefix_hashes
from dsv4_quant.conversion.journal import FOLDER, Workspace
from dsv4_quant.conversion.moving import last_uses, peak_bytes
from dsv4_quant.conversion.plan import Plan, cuts
from dsv4_quant.errors import DiskSpaceError, ManifestError, NotANumberError, UsageError
from dsv4_quant.progress import Progress

SMALL_FILE_BYTES = 1 << 16
"""What a config or the fixed part of the manifest may take."""

STEP_BYTES = 768
"""Per output tensor: its lines in index, manifest and journal."""


def check_separate(source: Path, out: Path) -> None:
    """Raises UsageError when OUT is no folder of its own."""
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UsageError("OUT and SRC lie inside one another", file=out, hint="Choose another OUT.")
    if out.is_symlink() and not out.exists():
        raise UsageError("OUT is a symbolic link to nothing", file=out)
    if out.exists() and not out.is_dir():
        raise UsageError("OUT is not a folder", file=out)


def check_empty(out: Path) -> None:
    """Raises UsageError when OUT holds anything but an unfinished conversion."""
    strangers = sorted(path.name for path in out.iterdir() if path.name != FOLDER)
    if strangers:
        raise UsageError(
            f"OUT is not empty: it holds {strangers[0]}",
            file=out,
            hint="Choose another OUT, or give --overwrite to replace the checkpoint there. If it"
            " is an earlier output of this command, `dsv4-quant verify` tells what is wrong.",
        )


def check_early(out: Path, *, overwrite: bool) -> None:
    """``check_empty`` before anything else is looked at, where there is nothing to continue."""
    begun = any((out / name).exists() for name in (MANIFEST, FOLDER))
    if out.is_dir() and not overwrite and not begun:
        check_empty(out)


def disk_room(
    plan: Plan, out: Path, *, overwrite: bool = False, move: bool = False
) -> tuple[int, int]:
    """Bytes that the output needs, and bytes free for it.

    With ``move`` the source makes room as it is freed, if it is on the same disk.

    What an earlier run of this conversion left counts as free; what is replaced does not, because
    it stays until the new output is complete.
    """
    place = next(p for p in (out, *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    carried = dict(carried_files(plan.source.root))
    is_unfinished = (out / FOLDER).is_dir()
    ours = [*(out / FOLDER).iterdir()] if is_unfinished else []
    if is_unfinished or not overwrite:
        made = (*LISTS.values(), MANIFEST, INDEX, CONFIG, INFERENCE_CONFIG)
        ours += [out / name for name in (*carried, *made, *(file.name for file in plan.files))]
    free += sum(_allocated(path) for path in ours)
    small = sum(path.stat().st_size for path in carried.values())
    weights = plan.bytes
    if move and place.stat().st_dev == plan.source.root.stat().st_dev:
        headers = plan.source.folder.headers
        sizes = {name: header.data_start + header.data_bytes for name, header in headers.items()}
        weights = peak_bytes(cuts(plan), last_uses(plan), sizes)
    weights += incoming_room(plan)
    return weights + small + 4 * SMALL_FILE_BYTES + STEP_BYTES * len(plan.steps), free


def _allocated(path: Path) -> int:
    """Bytes on disk of a file, 0 if it is none, or gone by now."""
    try:
        return path.lstat().st_blocks * 512 if path.is_file() else 0
    except FileNotFoundError:
        return 0


def check_room(plan: Plan, out: Path, *, overwrite: bool = False, move: bool = False) -> None:
    """Raises DiskSpaceError when the output does not fit."""
    need, free = disk_room(plan, out, overwrite=overwrite, move=move)
    if need > free:
        raise DiskSpaceError(
            f"The output needs {need:,} bytes, {free:,} are free",
            file=out,
            hint="Nothing was written. Free some space or choose another OUT. (--overwrite keeps"
            " the old output until the new one is complete.)",
        )


def stated_digests(source: Checkpoint) -> dict[str, str]:
    """What the source's own manifest says of its values; nothing where it has none.

    Raises ManifestError where it cannot be read: what it said is lost, so somebody must decide.
    """
    if not (source.root / MANIFEST).exists():
        return {}
    held = read_manifest(source.root / MANIFEST).tensors
    return {name: record.digest for name, record in held.items()}


def plan_key(plan: Plan) -> dict[str, Any]:
    """What makes two conversions the same: one can continue the other's work."""
    formats = plan.catalogue.formats
    return {
        "tool": f"dsv4-quant {__version__}",
        "source": identity(plan.source.folder, plan.source.config),
        "layout": plan.request.layout,
        "gpus": plan.request.gpus,
        "formats": {
            "experts": str(formats.experts),
            "dense": str(formats.dense),
            "wo_a": str(formats.wo_a),
        },
        "sums": plan.request.sums,
        "rule": plan.request.rule.value if plan.is_lossy else None,
        "calibration": _identity(plan.request.calibration) if plan.is_lossy else None,
    }


def same_plan(plan: Plan) -> str:
    """What processes must agree on before they share a plan."""
    options = plan.request.lossy, plan.request.rule.value
    return json.dumps([plan_key(plan), str(options), [file.size for file in plan.files]])


def _identity(calibration: Mapping[str, Any] | None) -> Any:
    return calibration and calibration["identity"]


def _key_of(manifest: Manifest) -> dict[str, Any]:
    return {
        "tool": manifest.tool,
        "source": manifest.source.get("identity"),
        "layout": manifest.layout,
        "gpus": manifest.gpus,
        "formats": dict(manifest.formats),
        "sums": manifest.hash_kind,
        "rule": None if manifest.requantised is None else manifest.requantised.rule,
        "calibration": manifest.requantised and _identity(manifest.requantised.calibration),
    }


def finished(
    out: Path, plan: Plan, key: Mapping[str, Any], *, workers: int, progress: Progress
) -> Manifest | None:
    """The manifest, if OUT is what this plan makes of this source: every byte and every value."""
    try:
        manifest = read_manifest(out / MANIFEST)
    except ManifestError:
        return None
    if _key_of(manifest) != key or not (out / LISTS[manifest.hash_kind]).is_file():
        return None
    progress.stage("checking the finished output")
    progress.total(sum(record.bytes for record in manifest.files.values()))
    if not _is_whole(out, manifest, progress) or not _comes_from(manifest, plan):
        return None
    progress.stage("checking what it was made of")
    try:
        digests = digest_source(plan.source, out / FOLDER, workers=workers, progress=progress)
    except NotANumberError:
        return None
    said = {name: record.made_of for name, record in manifest.tensors.items()}
    return manifest if digests == said else None


def _is_whole(out: Path, manifest: Manifest, progress: Progress) -> bool:
    """Whether all files are there and as manifest and the list of hashes say."""
    kind, text = manifest.hash_kind, (out / MANIFEST).read_bytes()
    itself = FileRecord.of(len(text), kind, _hash(text, kind))
    if (out / LISTS[kind]).read_bytes() != sums({**manifest.files, MANIFEST: itself}):
        return False
    return all(
        (out / name).is_file()
        and (out / name).stat().st_size == record.bytes
        and _hash(out / name, kind, progress.advance) == record.hash
        for name, record in manifest.files.items()
    )


def _comes_from(manifest: Manifest, plan: Plan) -> bool:
    """Whether the files beside the weights are those that the plan's source would give."""
    weights = {file.name for file in plan.files}
    return {n: r.hash for n, r in manifest.files.items() if n not in weights} == {
        name: _hash(content, manifest.hash_kind) for name, content in small_files(plan).items()
    }


def _hash(
    content: Path | bytes, kind: HashKind, advance: Callable[[int], None] = lambda count: None
) -> str:
    if isinstance(content, bytes):
        made = new_hash(kind)
        made.update(content)
        return made.hexdigest()
    size = content.stat().st_size
    return str(prefix_hashes(content, [size], kind, advance)[size].hexdigest())


def withdraw(work: Workspace, plan: Plan) -> None:
    """Takes back an output that was at its place already, when a part of it is not sound."""
    for name in (*LISTS.values(), MANIFEST, INDEX, CONFIG):
        (work.out / name).unlink(missing_ok=True)
    for file in plan.files:
        if (work.out / file.name).exists():
            (work.out / file.name).replace(work.folder / file.name)


def earlier_output(work: Workspace) -> list[str]:
    """The files of the checkpoint that OUT holds; the manifest first, which makes it complete."""
    out = work.out
    listed: list[str] = []
    for manifest in (out / MANIFEST, work.replaced / MANIFEST):  # there if a run was cut off
        with suppress(ManifestError):
            listed += read_manifest(manifest).files
    weights = sorted(path.name for path in out.iterdir() if is_weight_file(path.name))
    home = out.resolve()
    names = dict.fromkeys(
        (*LISTS.values(), MANIFEST, INDEX, CONFIG, INFERENCE_CONFIG, *listed, *weights)
    )
    return [name for name in names if (out / name).parent.resolve().is_relative_to(home)]
