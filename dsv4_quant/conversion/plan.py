"""The plan of one conversion: pure data, complete before a byte is written.

A plan lists every output file with its exact header, and every step: which weight is read, what is
done to it, and which bytes of which files the result fills. Steps are ordered so that every file
is written from its first byte to its last, whatever the number of files: that lets each file be
hashed while it is written, and gives a resumed run a point to continue from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from dsv4_quant.catalogue import (
    Catalogue,
    Formats,
    Layout,
    StoredTensor,
    TensorSpec,
    check_gpus,
    shard_count,
    shard_of,
)
from dsv4_quant.catalogue import stored as stored_tensors
from dsv4_quant.checkpoint.header import DTYPE_RANK, build_header
from dsv4_quant.checkpoint.placement import pieces
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.conversion.reads import reads
from dsv4_quant.conversion.request import Request
from dsv4_quant.errors import UsageError, some
from dsv4_quant.formats.blocks import BF16, FP4, Format, fp8
from dsv4_quant.hub.schedule import Range

COPY = "copy"

CUT_BYTES = 1 << 30
"""How often a run writes down how far it is."""


class Target(NamedTuple):
    """A rectangle of an output tensor in one file: its rows, and bytes of each row."""

    file: int
    offset: int
    row: int
    rows: int
    column: int
    row_bytes: int


class Step(NamedTuple):
    """One output tensor: the weight it comes from, the operation, and where it goes."""

    spec: TensorSpec
    operation: str
    out: StoredTensor
    targets: tuple[Target, ...]
    lossy: bool = False
    """Values are rounded where the operation is not exact, and what that costs is counted."""
    owned: bool = True
    """All rows are read, for digest, proof and cost; else only those that the targets hold."""

    @property
    def needs_codes(self) -> bool:
        """Whether it reads codes too: a copy's scales, and FP8's of FP4's, are made of scales."""
        of_scales = self.operation == COPY or (self.operation == "fp4_to_fp8" and not self.lossy)
        return not (self.out.is_scale and of_scales)

    def needs(self, start: int, stop: int) -> bool:
        """Whether rows [start, stop) of the weight must be read."""
        if self.owned and not self.out.is_scale:
            return True
        block = self.out.spec.format.block if self.out.is_scale else None
        b = 1 if block is None else block[0]
        first, last = start // b, -(-stop // b)
        return any(max(first, t.row) < min(last, t.row + t.rows) for t in self.targets)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of the output; ``header`` is its first bytes, ``size`` its whole length."""

    name: str
    header: bytes
    size: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What will be written, all of it."""

    source: Checkpoint
    request: Request
    catalogue: Catalogue
    """The output's weights in the output's formats."""
    files: tuple[OutputFile, ...]
    steps: tuple[Step, ...]

    @cached_property
    def bytes(self) -> int:
        """Bytes of all output files, small ones not counted."""
        return sum(file.size for file in self.files)

    @cached_property
    def reads(self) -> tuple[tuple[Range, ...], ...]:
        """The ranges of the source's files that each step reads."""
        return tuple(reads(self.source, self.steps))

    @cached_property
    def is_lossy(self) -> bool:
        """Whether any value may change."""
        return any(step.lossy for step in self.steps)

    @cached_property
    def operations(self) -> Counter[str]:
        """How many weights go through each operation."""
        return Counter(step.operation for step in self.steps if not step.out.is_scale)


def make_plan(source: Checkpoint, request: Request) -> Plan:
    """Plans a conversion. Raises UsageError when it cannot be done, before any work."""
    formats = output_formats(source, request)
    for before, after in _pairs(source.catalogue.formats, formats):
        operation_name(before, after)
    _check_fp4_blocks(source, formats)
    catalogue = source.catalogue.with_formats(formats)
    check_gpus(catalogue, request.gpus)
    held = [
        (spec, tensor)
        for spec in source.specs.values()
        for tensor in stored_tensors(catalogue.specs[spec.name], request.layout)
    ]
    files, places = _lay_out(held, catalogue, request)
    steps = [
        Step(
            spec,
            operation_name(spec.format, tensor.spec.format),
            tensor,
            places[tensor.name],
            request.lossy and may_round(spec.format, tensor.spec.format),
        )
        for spec, tensor in held
    ]
    steps.sort(key=lambda step: _order(step, request.layout))
    return Plan(source, request, catalogue, files, tuple(steps))


def output_formats(source: Checkpoint, request: Request) -> Formats:
    """The formats that the request asks for, given what the source holds."""
    held = source.catalogue.formats
    block = source.config.fp8_block
    experts = {
        "keep": held.experts,
        "fp4": FP4,
        "fp8": held.experts if held.experts.kind == "fp8" else fp8(block),
        "bf16": BF16,
    }[request.experts]
    dense = {
        "keep": held.dense,
        "fp8": held.dense if held.dense.kind == "fp8" else fp8(block),
        "bf16": BF16,
    }[request.dense]
    # wo_a: BF16 in every published mp layout; on the way back to hf it becomes FP8 again
    restored = dense if source.layout == "mp" or request.dense == "fp8" else held.wo_a
    wo_a = BF16 if request.layout == "mp" or dense == BF16 else restored
    return Formats(experts=experts, dense=dense, wo_a=wo_a)


def _check_fp4_blocks(source: Checkpoint, after: Formats) -> None:
    """FP4 has no ragged blocks, and a tile in FP8 is made of whole ones."""
    before, config = source.catalogue.formats.experts, source.config
    assert FP4.block is not None
    group = FP4.block[1]
    widths = {
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
    }
    ragged = [f"{key} ({width})" for key, width in widths.items() if width % group]
    if FP4 in (before, after.experts) and ragged:
        raise UsageError(f"FP4 experts need rows of whole blocks of {group}, unlike {some(ragged)}")
    tile = after.experts.block
    if before == FP4 and tile is not None and tile[1] % group:
        raise UsageError(
            f"FP4 blocks of {group} columns do not fit FP8 blocks of {tile[1]} columns"
        )


def _pairs(before: Formats, after: Formats) -> tuple[tuple[Format, Format], ...]:
    return (
        (before.experts, after.experts),
        (before.dense, after.dense),
        (before.wo_a, after.wo_a),
    )


@cache
def operation_name(before: Format, after: Format) -> str:
    """``copy``, or such as ``fp4_to_fp8``. Raises UsageError for a road that does not exist."""
    if before == after:
        return COPY
    name = f"{before.kind}_to_{after.kind}"
    if before.kind == after.kind:
        raise UsageError(f"There is no way from {before} to {after}")
    return name


@cache
def may_round(before: Format, after: Format) -> bool:
    """Whether a cast can be one that changes values: to fewer bits, or from scales in float32.

    FP4 and FP8 with power-of-two scales decode to BF16 exactly, but for values that BF16 cannot
    reach at all; those are refused, rounding would not help them.
    """
    if before == after:
        return False
    return after.kind != "bf16" or before.scale == "f32"


def _order(step: Step, layout: Layout) -> tuple[int, int, str]:
    """Sorts steps so that each file's bytes come in order: by dtype and name inside a file.

    All rank files sort their tensors alike, so one order serves them all; hf shards are written
    one after the other.
    """
    file = step.targets[0].file if layout == "hf" else 0
    return file, DTYPE_RANK[step.out.dtype], step.out.name


def _lay_out(
    held: list[tuple[TensorSpec, StoredTensor]], catalogue: Catalogue, request: Request
) -> tuple[tuple[OutputFile, ...], dict[str, tuple[Target, ...]]]:
    """The files with their headers, and the targets of every tensor by name."""
    names = list(file_names(catalogue, request))
    content: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in names]
    parts = {}
    for spec, tensor in held:
        parts[tensor.name] = [
            (piece.rank if request.layout == "mp" else shard_of(spec, catalogue.config), piece)
            for piece in pieces(tensor, request.gpus, catalogue.config.n_routed_experts)
        ]
        for file, piece in parts[tensor.name]:
            content[file].append((tensor.name, tensor.dtype, piece.shape))
    built = [build_header(tensors) for tensors in content]
    files = tuple(
        OutputFile(
            name, header, len(header) + max((e.end for e in entries.values()), default=0),
            tuple(entries),
        )
        for name, (header, entries) in zip(names, built, strict=True)
    )  # fmt: skip
    targets = {
        name: tuple(
            Target(
                file,
                len(built[file][0]) + built[file][1][name].start,
                piece.row,
                piece.rows,
                piece.column,
                piece.row_bytes,
            )
            for file, piece in placed
        )
        for name, placed in parts.items()
    }
    return files, targets


def file_names(catalogue: Catalogue, request: Request) -> Iterator[str]:
    """The names of the output's weight files, in order."""
    if request.layout == "mp":
        yield from (f"model{r}-mp{request.gpus}.safetensors" for r in range(request.gpus))
        return
    count = shard_count(catalogue.config)
    yield from (f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1))


def cuts(plan: Plan, every: int = CUT_BYTES) -> Iterator[tuple[int, dict[int, int]]]:
    """(steps done, bytes of each file done) at about every GiB, and at the end."""
    marks: dict[int, int] = {}
    since = 0
    for index, step in enumerate(plan.steps, 1):
        for target in step.targets:
            size = target.rows * target.row_bytes
            marks[target.file] = target.offset + size
            since += size
        if since >= every or index == len(plan.steps):
            yield index, dict(marks)
            since = 0
