"""One conversion from beginning to end: validate all, stream, finish.

Until the last moment everything lies in ``OUT/.dsv4-partial``. Then the weight files move to their
places, after them the files that came along, the index and the configs, and last the manifest and
SHA256SUMS. A folder with a manifest is complete; one without is not.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4_quant import __version__
from dsv4_quant.checkpoint.manifest import (
    MANIFEST,
    SUMS,
    FileRecord,
    Manifest,
    TensorRecord,
    sums,
)
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.checkpoint.sidecars import carried_files, identity
from dsv4_quant.convert.budget import Budget, budget
from dsv4_quant.convert.certificate import certificates
from dsv4_quant.convert.configs import config_json, index_json, inference_config_json
from dsv4_quant.convert.files import sync_folder, write_durably
from dsv4_quant.convert.journal import FOLDER, Resume, Workspace
from dsv4_quant.convert.plan import Plan, make_plan
from dsv4_quant.convert.request import Request
from dsv4_quant.convert.stream import Result, Stream
from dsv4_quant.errors import (
    DiskSpaceError,
    NotANumberError,
    SourceChangedError,
    UsageError,
    ValueNotExactError,
    WriteError,
)
from dsv4_quant.progress import NoProgress, Progress

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
INFERENCE_CONFIG = "inference/config.json"


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a finished conversion did."""

    out: Path
    manifest: Manifest
    bytes: int
    resumed_bytes: int
    seconds: float


def convert(
    src: str | Path,
    out: str | Path,
    request: Request,
    *,
    workers: int | None = None,
    max_memory: int = 4 << 30,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Converts a checkpoint folder. Continues by itself what an earlier run left unfinished.

    Raises a Dsv4Error subclass; the output is then either absent or visibly unfinished.
    """
    began = time.monotonic()
    progress = progress or NoProgress()
    with Checkpoint.open(src) as source:
        progress.stage("planning")
        plan = make_plan(source, request)
        limits = budget(plan, workers=workers, max_memory=max_memory)
        target = Path(out)
        _check_separate(source.root, target)
        _check_room(plan, target)
        stamps = _stamps(source)
        work = Workspace(target)
        try:
            resume = _prepare(work, plan, overwrite=overwrite, progress=progress)
            results, hashes = _stream(work, plan, resume, limits, progress)
            if _stamps(source) != stamps:
                work.discard()
                raise SourceChangedError(
                    "A source file changed while it was read; what was written is void",
                    file=source.root,
                    hint="Let nothing write to the source, and run the same command again.",
                )
            progress.stage("finishing")
            manifest = _finish(work, plan, results, hashes)
        finally:
            work.close()
    done = sum(mark for mark, _ in resume.prefixes.values())
    return ConvertReport(target, manifest, plan.bytes, done, time.monotonic() - began)


def _check_separate(source: Path, out: Path) -> None:
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UsageError("OUT and SRC lie inside one another", file=out, hint="Choose another OUT.")
    if out.exists() and not out.is_dir():
        raise UsageError("OUT is not a folder", file=out)


def disk_room(plan: Plan, out: Path) -> tuple[int, int]:
    """Bytes that the output needs, and bytes that are free for it (its own partial files count)."""
    place = next(p for p in (out, *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    partial = out / FOLDER
    if partial.is_dir():
        free += sum(entry.stat().st_blocks * 512 for entry in partial.iterdir())
    for file in plan.files:
        if (out / file.name).is_file():
            free += (out / file.name).stat().st_blocks * 512
    small = sum(path.stat().st_size for _, path in carried_files(plan.source.root))
    return plan.bytes + small + 2048 * len(plan.steps), free


def _check_room(plan: Plan, out: Path) -> None:
    need, free = disk_room(plan, out)
    if need > free:
        raise DiskSpaceError(
            f"The output needs {need:,} bytes, {free:,} are free",
            file=out,
            hint="Nothing was written. Free some space or choose another OUT.",
        )


def _stamps(source: Checkpoint) -> dict[str, tuple[int, int]]:
    """Size and time of every source file."""
    try:
        found = {name: (source.root / name).stat() for name in source.folder.headers}
    except OSError as error:
        raise SourceChangedError(
            f"A source file vanished: {error.strerror}",
            file=error.filename,
            hint="Restore it and run the same command again: it continues.",
        ) from None
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def _prepare(work: Workspace, plan: Plan, *, overwrite: bool, progress: Progress) -> Resume:
    """An empty workspace for this plan, or the point from which to continue an earlier run."""
    key = {
        "tool": __version__,
        "source": identity(plan.source.folder, plan.source.config),
        "layout": plan.request.layout,
        "gpus": plan.request.gpus,
        "experts": str(plan.catalogue.formats.experts),
        "dense": str(plan.catalogue.formats.dense),
        "wo_a": str(plan.catalogue.formats.wo_a),
    }
    before = work.plan
    if before == key and not overwrite:
        progress.stage("checking what an earlier run left")
        return work.resume()
    strangers = sorted(entry.name for entry in work.out.iterdir() if entry.name != FOLDER)
    if before is not None and not overwrite:
        raise UsageError(
            "OUT holds an unfinished conversion of another checkpoint or to another form",
            file=work.out,
            hint="Finish it with its own command, choose another OUT, or give --overwrite.",
        )
    if strangers and not overwrite:
        if before is None:
            work.discard()
        raise UsageError(
            f"OUT is not empty: it holds {strangers[0]}",
            file=work.out,
            hint="Choose another OUT, or give --overwrite to replace what is there.",
        )
    if overwrite:
        _remove_checkpoint(work.out)
    work.begin(key)
    return Resume()


def _remove_checkpoint(out: Path) -> None:
    """The weights of an earlier output; the manifest goes first, so it no longer looks complete."""
    for name in (SUMS, MANIFEST, INDEX, CONFIG):
        (out / name).unlink(missing_ok=True)
    for path in out.glob("model*.safetensors"):
        path.unlink()


def _stream(
    work: Workspace, plan: Plan, resume: Resume, limits: Budget, progress: Progress
) -> tuple[dict[str, Result], dict[str, str]]:
    """Runs all steps; gives the result of every weight and the SHA-256 of every file."""
    progress.stage("converting")
    progress.total(plan.bytes)
    progress.advance(sum(mark for mark, _ in resume.prefixes.values()))
    try:
        stream = Stream(plan, work, resume, values=limits.panel_values, progress=progress)
        try:
            stream.run(limits.workers)
        finally:
            stream.close()
    except (ValueNotExactError, NotANumberError):
        work.discard()  # the same command would fail again: nothing to continue
        raise
    hashes = {
        file.name: written.marked[file.size]
        for file, written in zip(plan.files, stream.files, strict=True)
    }
    return stream.results, hashes


def _finish(
    work: Workspace, plan: Plan, results: Mapping[str, Result], hashes: Mapping[str, str]
) -> Manifest:
    """Moves everything to its place; manifest and SHA256SUMS last."""
    records = {file.name: FileRecord(file.size, hashes[file.name]) for file in plan.files}
    small = _small_files(plan)
    try:
        for file in plan.files:
            if (work.folder / file.name).exists():
                (work.folder / file.name).replace(work.out / file.name)
        for name, content in small.items():
            records[name] = _place(work, name, content)
        manifest = _manifest(plan, results, records)
        records[MANIFEST] = _place(work, MANIFEST, manifest.to_json())
        _place(work, SUMS, sums(records))
        sync_folder(work.out)
        work.discard()
        sync_folder(work.out)
    except OSError as error:
        raise WriteError(
            f"Finishing failed: {error.strerror}",
            file=error.filename,
            hint="Run the same command again: it continues.",
        ) from None
    return manifest


def _place(work: Workspace, name: str, content: bytes | Path) -> FileRecord:
    """Writes a small file beside its place, makes it durable, then moves it there."""
    temporary = work.folder / "small"
    record = write_durably(temporary, content)
    place = work.out / name
    if place.parent != work.out:
        place.parent.mkdir(parents=True, exist_ok=True)
    else:
        sync_folder(work.out)  # what came before is durable before this can be seen
    temporary.replace(place)
    if place.parent != work.out:
        sync_folder(place.parent)
    return record


def _small_files(plan: Plan) -> dict[str, bytes | Path]:
    """Everything but the weights, in the order in which it appears; paths are copied."""
    found: dict[str, bytes | Path] = dict(carried_files(plan.source.root))
    if plan.request.layout == "hf":
        weight_map = {tensor: file.name for file in plan.files for tensor in file.tensors}
        size = sum(step.out.nbytes for step in plan.steps)
        found[INDEX] = index_json(weight_map, size)
    if plan.request.layout == "mp" or (plan.source.root / INFERENCE_CONFIG).exists():
        formats = plan.catalogue.formats
        found[INFERENCE_CONFIG] = inference_config_json(plan.source.config, formats)
    found[CONFIG] = config_json(plan.catalogue, plan.request.layout)
    return found


def _manifest(
    plan: Plan, results: Mapping[str, Result], records: Mapping[str, FileRecord]
) -> Manifest:
    formats = plan.catalogue.formats
    specs = plan.catalogue.specs
    return Manifest(
        tool=f"dsv4-quant {__version__}",
        layout=plan.request.layout,
        gpus=plan.request.gpus,
        formats={
            "experts": str(formats.experts),
            "dense": str(formats.dense),
            "wo_a": str(formats.wo_a),
        },
        files=dict(records),
        tensors={
            name: TensorRecord(str(specs[name].format), results[name].digest) for name in specs
        },
        source={
            "layout": plan.source.layout,
            "gpus": plan.source.gpus,
            "identity": identity(plan.source.folder, plan.source.config),
        },
        options={"experts": plan.request.experts, "dense": plan.request.dense},
        certificate=certificates(plan, results),
    )
