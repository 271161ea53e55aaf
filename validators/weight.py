"""One weight on its way through the judgement: what its panels have shown so far."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.digest import LeafHasher, TensorDigest, leaf_rows
from dsv4_quant.checkpoint.reader import Bytes, Located
from dsv4_quant.errors import NotANumberError
from dsv4_quant.formats.blocks import Tensor
from dsv4_quant.validators.difference import Difference, decoded_rows
from dsv4_quant.validators.rounding import Measured
from dsv4_quant.validators.scan import scan
from dsv4_quant.validators.tally import Spot, Tally, joined, spot_of

Leaves = dict[int, tuple[int, bytes]]
"""Leaf -> bits per value, and hash."""

Advance = Callable[[int], None]


class Digest:
    """A weight's value digest in the making; a NaN anywhere, and there is none."""

    def __init__(self, spec: TensorSpec) -> None:
        self._leaves: TensorDigest | None = TensorDigest(*spec.matrix)

    def add(self, leaves: Leaves | None) -> None:
        """The leaves of one panel; None where it holds a NaN or could not be read."""
        if leaves is None:
            self._leaves = None
        elif self._leaves is not None:
            for leaf, hashed in leaves.items():
                self._leaves.add(leaf, *hashed)

    def finish(self) -> str | None:
        """The hex digest, when all panels have been added."""
        return None if self._leaves is None else self._leaves.hexdigest()


class Weight:
    """Counts, digests and differences of one weight; panels come in any order, from any thread."""

    def __init__(self, spec: TensorSpec, file: str, panels: int, *, is_compared: bool) -> None:
        self.spec = spec
        self.file = file
        self.waiting = panels
        self.is_compared = is_compared
        self.is_rounded = False
        """Whether the other checkpoint's values are meant to differ; then measured, not told."""
        self.measured: Measured | None = None
        """What rounding cost, where it is to be measured."""
        self.tally = Tally()
        self.mine, self.theirs = Digest(spec), Digest(spec)
        self.difference = Difference(values=spec.matrix[0] * spec.matrix[1])
        self.copies: dict[tuple[str, str], Spot] = {}
        """(file, stored tensor) of another rank -> bytes that differ from the first rank's."""
        self.unread: dict[str, str] = {}
        """File -> why it could not be read."""
        self.lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Panel:
    """Rows [start, stop) of a weight."""

    weight: Weight
    start: int
    stop: int


def judge_panel(
    panel: Panel, checkpoint: Checkpoint, experts: int, hasher: LeafHasher, advance: Advance
) -> tuple[Tensor, Leaves | None]:
    """Reads, counts and hashes a panel, and looks at the other ranks' copies of it."""
    weight, name = panel.weight, panel.weight.spec.name
    held = checkpoint.read_rows(name, panel.start, panel.stop)
    tally = scan(held, panel.start)
    if held.format.kind == "i64":
        tally.note_bad((held.codes < 0) | (held.codes >= experts), panel.start, held.codes)
    leaves = _leaves(hasher, name, held, panel.start)
    advance(held.nbytes)
    copies = _compare_copies(checkpoint, panel, held, advance)
    with weight.lock:
        weight.tally.add(tally)
        weight.mine.add(leaves)
        for place, spot in copies.items():
            weight.copies[place] = joined(weight.copies.get(place), spot) or spot
    return held, leaves


def compare_panel(
    panel: Panel,
    held: Tensor,
    leaves: Leaves | None,
    other: Checkpoint,
    hasher: LeafHasher,
    advance: Advance,
) -> int:
    """The same rows of another checkpoint: leaves that hash alike are equal, others are decoded.

    Of a weight whose rounding is measured all leaves are. Returns the bytes read.
    """
    weight, name = panel.weight, panel.weight.spec.name
    theirs = other.read_rows(name, panel.start, panel.stop)
    their_leaves = _leaves(hasher, name, theirs, panel.start)
    advance(theirs.nbytes)
    found, measured = Difference(), None if weight.measured is None else Measured()
    rows, step = panel.stop - panel.start, leaf_rows(weight.spec.matrix[1])
    for start in range(0, rows, step):
        leaf = (panel.start + start) // step
        is_equal = leaves and their_leaves and leaves[leaf] == their_leaves[leaf]
        if is_equal and measured is None:
            continue
        stop = min(start + step, rows)
        mine, other_values = decoded_rows(held, start, stop), decoded_rows(theirs, start, stop)
        if measured is not None:
            measured.add(other_values, mine)
        if not is_equal and not weight.is_rounded:
            found.add(mine, other_values, panel.start + start)
    with weight.lock:
        weight.theirs.add(their_leaves)
        weight.difference.join(found)
        if weight.measured is not None and measured is not None:
            weight.measured.join(measured)
    return theirs.nbytes


def _leaves(hasher: LeafHasher, name: str, panel: Tensor, first_row: int) -> Leaves | None:
    """The panel's leaves; None where it holds a NaN, which has no digest."""
    try:
        found = hasher.leaves(name, panel, first_row)
        return {leaf: (bits, digest) for leaf, bits, digest in found}
    except NotANumberError:
        return None


def _compare_copies(
    checkpoint: Checkpoint, panel: Panel, held: Tensor, advance: Advance
) -> dict[tuple[str, str], Spot]:
    """What other ranks hold of the same rows must be the same bytes."""
    found: dict[tuple[str, str], Spot] = {}
    if checkpoint.gpus == 1:
        return found
    block = panel.weight.spec.format.block
    for stored in checkpoint.stored(panel.weight.spec):
        located = checkpoint.locate(stored)
        if not located.copies:
            continue
        b = block[0] if stored.is_scale and block is not None else 1
        start, stop = panel.start // b, -(-panel.stop // b)
        array = held.scales if stored.is_scale else held.codes
        assert array is not None
        mine: Bytes = np.ascontiguousarray(array).reshape(stop - start, -1).view(np.uint8)
        for extent in located.copies:
            copy = Located(stored, located.rows, located.row_bytes, (extent,))
            theirs = checkpoint.read_bytes(copy, start, stop)
            advance(theirs.nbytes)
            spot = None
            if not np.array_equal(mine, theirs):
                spot = spot_of(mine != theirs, start, theirs)
            if spot is not None:
                found[extent.file, stored.name] = spot
    return found
