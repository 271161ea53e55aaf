"""Condenses what a forward pass shows of itself, layer by layer, while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.errors import NotANumberError
from dsv4_quant.fingerprints.script import Script
from dsv4_quant.fingerprints.sketch import Digest, Digester, digest, row_hashes
from dsv4_quant.model.observer import Observer, Part
from dsv4_quant.progress import NoProgress, Progress

if TYPE_CHECKING:
    from torch import Tensor

Routes = dict[int, list[NDArray[np.int64]]]
"""Per layer and prompt: the experts ``[rows, k]`` of the script's rows."""


@dataclass(frozen=True, slots=True)
class SubLayer:
    """The streams after one sub-layer: a digest per prompt, and the hashes of the script's rows."""

    layer: int
    part: Part
    prompts: tuple[Digest, ...]
    rows: bytes

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(np.isfinite(one.norm) for one in self.prompts)


class Watcher(Observer):
    """Collects SubLayers, routes and digests of logits; stops a pass that has gone to NaN."""

    def __init__(self, script: Script, progress: Progress | None = None) -> None:
        self.streams_seen: list[SubLayer] = []
        self.routes: Routes = {}
        self._script, self._progress = script, progress or NoProgress()
        self._digests: list[Digest] = []
        self._rows = b""
        self._logits: dict[tuple[bool, int], Digester] = {}
        self._spots: dict[int, list[NDArray[np.float32]]] = {}
        self._done = 0

    def streams(self, layer: int, part: Part, prompt: int, h: Tensor) -> None:
        """Called for one prompt after the other."""
        self._progress.advance(0)  # a layer may take minutes: here the pass can be stopped
        values = h.flatten(1).numpy()  # [t, s * d]
        self._digests.append(digest(values))
        self._rows += row_hashes(values[list(self._script.rows[prompt])])
        if prompt + 1 < len(self._script.prompts):
            return
        seen = SubLayer(layer, part, tuple(self._digests), self._rows)
        self._digests, self._rows = [], b""
        self.streams_seen.append(seen)
        if not seen.is_finite:
            raise NotANumberError(f"The streams hold NaN or infinity after {part} of layer {layer}")

    def routed(self, layer: int, prompt: int, experts: Tensor) -> None:
        """Keeps the experts of the script's rows."""
        rows = experts.numpy()[list(self._script.rows[prompt])]
        self.routes.setdefault(layer, []).append(rows)

    def logits(self, prompt: int, first: int, rows: Tensor, *, mtp: bool) -> None:
        """Keeps the script's spots; of all other positions only the digest."""
        values = rows.numpy()
        self._logits.setdefault((mtp, prompt), Digester(values.shape[1])).add(values)
        if not mtp:
            here = range(first, first + len(values))
            spots = [spot - first for spot in self._script.spots[prompt] if spot in here]
            self._spots.setdefault(prompt, []).append(values[spots])

    def digests(self, *, mtp: bool) -> tuple[Digest, ...]:
        """Per prompt, of all logits; none of an MTP block that was not run."""
        return tuple(one.digest() for (of_mtp, _), one in self._logits.items() if of_mtp == mtp)

    def spots(self) -> tuple[NDArray[np.float32], ...]:
        """Per prompt the logits ``[spots, vocab_size]`` of the script's spots."""
        return tuple(np.concatenate(rows) for rows in self._spots.values())

    def note(self, text: str) -> None:
        """Tells the progress."""
        self._progress.note(text)

    def read(self, count: int) -> None:
        """Tells the progress."""
        self._progress.read(count)

    def finished(self, done: int, total: int) -> None:
        """Tells the progress."""
        if not self._done:
            self._progress.total(total)
        self._progress.advance(done - self._done)
        self._done = done
