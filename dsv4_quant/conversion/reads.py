"""Which bytes of the source each step of a plan reads: pure data, as all of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from dsv4_quant.catalogue import StoredTensor
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.hub.schedule import Range

if TYPE_CHECKING:
    from dsv4_quant.conversion.plan import Step


def reads(source: Checkpoint, steps: Iterable[Step]) -> Iterator[tuple[Range, ...]]:
    """Per step, the ranges of the source's files that it reads."""
    for step in steps:
        held = source.stored(step.spec)
        needed = held if step.needs_codes else held[1:]
        yield tuple(found for tensor in needed for found in ranges(source, tensor))


def ranges(source: Checkpoint, tensor: StoredTensor) -> Iterator[Range]:
    """Where a stored tensor's bytes are, those of all its copies too."""
    located = source.locate(tensor)
    for extent in (*located.extents, *located.copies):
        if nbytes := extent.rows * extent.row_bytes:
            yield Range(extent.file, extent.offset, extent.offset + nbytes)
