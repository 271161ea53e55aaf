"""The end of a conversion: everything goes to its place, and what makes it whole comes last."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint.folder import Folder
from dsv4_quant.checkpoint.header import read_header
from dsv4_quant.checkpoint.manifest import MANIFEST, FileRecord, Manifest, TensorRecord, sums
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.checkpoint.requantised import Requantised, by_layer
from dsv4_quant.checkpoint.sums import LISTS, HashKind
from dsv4_quant.conversion.certificate import certificates
from dsv4_quant.conversion.configs import small_files
from dsv4_quant.conversion.files import write_durably
from dsv4_quant.conversion.journal import Workspace
from dsv4_quant.conversion.plan import Plan
from dsv4_quant.conversion.results import Result
from dsv4_quant.conversion.target import plan_key
from dsv4_quant.durable import sync_folder


def written(plan: Plan, work: Workspace) -> Checkpoint:
    """The output's weights, all there but not at their place yet, as a checkpoint to read."""
    places = {file.name: work.locate(file.name) for file in plan.files}
    folder = Folder(next(iter(places.values())).parent, plan.request.layout, plan.request.gpus)
    folder.headers = {name: read_header(path) for name, path in places.items()}
    folder.index = {tensor: file.name for file in plan.files for tensor in file.tensors}
    return Checkpoint(folder, plan.source.config, plan.catalogue)


def finish(
    work: Workspace, plan: Plan, results: Mapping[str, Result], hashes: Mapping[str, str]
) -> Manifest:
    """Moves everything to its place; the manifest and the list of hashes last."""
    kind = plan.request.sums
    records = {file.name: FileRecord.of(file.size, kind, hashes[file.name]) for file in plan.files}
    small = small_files(plan)
    for file in plan.files:
        held = work.locate(file.name)
        if held.stat().st_size != file.size:
            raise OSError(errno.EIO, "Another program has changed the file's size", str(held))
        if held.parent == work.folder:
            held.replace(work.out / file.name)
    for name, content in small.items():
        records[name] = _place(work, name, content, kind)
    manifest = _manifest(plan, results, records)
    records[MANIFEST] = _place(work, MANIFEST, manifest.to_json(), kind)
    _place(work, LISTS[kind], sums(records), kind)
    sync_folder(work.out)
    return manifest


def _place(work: Workspace, name: str, content: bytes | Path, kind: HashKind) -> FileRecord:
    """Writes a small file beside its place, makes it durable, then moves it there."""
    temporary = work.folder / "small"
    record = write_durably(temporary, content, kind)
    place = work.out / name
    if place.parent != work.out:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.resolve().is_relative_to(work.out.resolve()):
            raise OSError(errno.ELOOP, "A symbolic link that leaves OUT", str(place.parent))
    else:
        sync_folder(work.out)  # what came before is durable before this can be seen
    temporary.replace(place)
    if place.parent != work.out:
        sync_folder(place.parent)
    return record


def _manifest(
    plan: Plan, results: Mapping[str, Result], records: Mapping[str, FileRecord]
) -> Manifest:
    key, specs = plan_key(plan), plan.catalogue.specs
    return Manifest(
        tool=key["tool"],
        layout=key["layout"],
        gpus=key["gpus"],
        formats=key["formats"],
        files=dict(records),
        tensors={name: _record(specs[name], results[name]) for name in specs},
        source={
            "layout": plan.source.layout,
            "gpus": plan.source.gpus,
            "identity": key["source"],
        },
        options={
            "experts": plan.request.experts,
            "dense": plan.request.dense,
            "lossy": plan.request.lossy,
        },
        certificate=certificates(plan, results),
        requantised=_requantised(plan, results),
    )


def _record(spec: TensorSpec, result: Result) -> TensorRecord:
    source = None if result.read == result.digest else result.read
    return TensorRecord(str(spec.format), result.digest, source)


def _requantised(plan: Plan, results: Mapping[str, Result]) -> Requantised | None:
    if not plan.is_lossy:
        return None
    costs = {name: result.cost for name, result in results.items() if result.cost is not None}
    layers = by_layer(plan.catalogue.specs.values(), costs)
    calibration = None
    if plan.request.calibration is not None:
        moved = [result.moved for result in results.values() if result.moved]
        took = {"weights_moved": len(moved), "rows_moved": sum(moved)}
        calibration = {**plan.request.calibration, **took}
    return Requantised(plan.request.rule.value, costs, layers, calibration)
