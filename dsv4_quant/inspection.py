"""What a checkpoint holds, and what each GPU would: from headers alone, whatever its size.

Weights of the same shape, format, split and role are one class; a checkpoint of 145,000 tensors
has about a hundred classes, and everything here is counted by class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dsv4_quant.catalogue import Catalogue, Formats, Layout, TensorSpec, check_gpus, stored
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.formats.blocks import BF16, FP4, Format, fp8
from dsv4_quant.releases import guess_release


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of one role and dtype, in all files together."""

    role: str
    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PerGpu:
    """What every GPU will hold with the experts in one format: tensors, and bytes of data."""

    experts: str
    is_held: bool
    """Whether the checkpoint has its experts in this format."""
    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Split:
    """The published mp layout for a number of GPUs: wo_a in BF16, the rest as it is."""

    gpus: int
    per_gpu: tuple[PerGpu, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything that headers and config say."""

    path: str
    layout: Layout
    gpus: int
    """How many GPUs the files are split for; 1 for hf."""
    files: int
    release: str
    note: str
    """What is uncertain about the release, or how the checkpoint is different from one."""
    experts: str
    dense: str
    wo_a: str
    tensors: int
    """Tensors in all files: scales count, and copies on several ranks count each."""
    bytes: int
    parts: tuple[Part, ...]
    split: Split | None


def inspect(path: str | Path, gpus: int | None = None) -> Inspection:
    """Looks at a checkpoint folder in either layout.

    Raises UnreadableError if anything is wrong with names, shapes or formats, and UsageError if
    ``gpus`` is given and the model cannot be split so.
    """
    with Checkpoint.open(path) as checkpoint:
        catalogue = checkpoint.catalogue
        release = guess_release(checkpoint.config, catalogue.formats)
        parts = tuple(parts_of(catalogue, checkpoint.layout, checkpoint.gpus))
        return Inspection(
            path=str(path),
            layout=checkpoint.layout,
            gpus=checkpoint.gpus,
            files=len(checkpoint.folder.headers),
            release=release.name,
            note=release.note,
            experts=str(catalogue.formats.experts),
            dense=str(catalogue.formats.dense),
            wo_a=str(catalogue.formats.wo_a),
            tensors=sum(part.tensors for part in parts),
            bytes=sum(part.bytes for part in parts),
            parts=parts,
            split=None if gpus is None else split_over(catalogue, gpus),
        )


def parts_of(catalogue: Catalogue, layout: Layout, gpus: int) -> Iterator[Part]:
    """Tensors and bytes by role and dtype; roles in the model's order."""
    tensors: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for spec, count in _classes(catalogue):
        for dtype, each, held in _on_one_gpu(spec, count, layout, gpus):
            tensors[spec.role, dtype] += held * gpus
            sizes[spec.role, dtype] += each * held * gpus
    roles = {role: None for role, _ in tensors}  # a set that keeps its order
    for role in roles:
        for dtype in sorted(dtype for other, dtype in tensors if other == role):
            yield Part(role, dtype, tensors[role, dtype], sizes[role, dtype])


def split_over(catalogue: Catalogue, gpus: int) -> Split:
    """What each GPU will hold in every format of the experts. Raises UsageError."""
    held = catalogue.formats
    rest = catalogue.with_formats(replace(held, wo_a=BF16))
    check_gpus(rest, gpus)
    classes = list(_classes(rest))
    return Split(
        gpus,
        tuple(
            PerGpu(format.kind, format == held.experts, *_total(classes, format, gpus))
            for format in _expert_formats(held, catalogue.config.fp8_block)
        ),
    )


def _expert_formats(held: Formats, block: tuple[int, int]) -> tuple[Format, ...]:
    """FP4, FP8 and BF16; FP8 keeps the scales that a checkpoint has for it."""
    return FP4, held.experts if held.experts.kind == "fp8" else fp8(block), BF16


def _total(classes: list[tuple[TensorSpec, int]], experts: Format, gpus: int) -> tuple[int, int]:
    """Tensors and bytes on one GPU with the experts in another format."""
    tensors = size = 0
    for spec, count in classes:
        stored_so = spec._replace(format=experts) if spec.kind == "expert" else spec
        for _, each, held in _on_one_gpu(stored_so, count, "mp", gpus):
            tensors += held
            size += each * held
    return tensors, size


def _on_one_gpu(
    spec: TensorSpec, count: int, layout: Layout, gpus: int
) -> Iterator[tuple[str, int, int]]:
    """For a class of weights (dtype, bytes of one tensor, tensors): codes, then scales.

    All GPUs hold the same: ``check_gpus`` has made sure that everything divides evenly.
    """
    for tensor in stored(spec, layout):
        if spec.split == "expert":
            yield tensor.dtype, tensor.nbytes, count // gpus
        elif spec.split is None:
            yield tensor.dtype, tensor.nbytes, count
        else:
            yield tensor.dtype, tensor.nbytes // gpus, count


def _classes(catalogue: Catalogue) -> Iterator[tuple[TensorSpec, int]]:
    """One weight of every class, and how many there are of it."""
    classes = Counter(spec[1:6] for spec in catalogue.specs.values())
    for (shape, form, split, role, kind), count in classes.items():
        yield TensorSpec("any", shape, form, split, role, kind), count
