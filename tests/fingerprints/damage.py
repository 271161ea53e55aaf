"""Checkpoints that differ from one on disk, in memory: what the model needs of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.catalogue import StoredTensor, TensorSpec
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.config import ModelConfig
from dsv4_quant.formats.blocks import Tensor

Alteration = Callable[[str, Tensor], Tensor]
"""A whole weight by its name, and what is read in its place."""


class Altered:
    """A checkpoint whose weights are altered as they are read."""

    def __init__(self, ckpt: Checkpoint, alter: Alteration) -> None:
        self._ckpt, self._alter = ckpt, alter
        self._whole: dict[str, Tensor] = {}

    @property
    def root(self) -> Path:
        return self._ckpt.root

    @property
    def config(self) -> ModelConfig:
        return self._ckpt.config

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._ckpt.specs

    def halt(self) -> None:
        self._ckpt.halt()

    def stored(self, spec: TensorSpec) -> tuple[StoredTensor, ...]:
        return self._ckpt.stored(spec)

    def announce(self, name: str, start: int, stop: int, *, copies: bool = False) -> int:
        return self._ckpt.announce(name, start, stop, copies=copies)

    def read(self, name: str) -> Tensor:
        return self._alter(name, self._ckpt.read(name))

    def read_rows(self, name: str, start: int, stop: int, *, copies: bool = False) -> Tensor:
        if name not in self._whole:
            self._whole[name] = self.read(name)
        whole = self._whole[name]
        if len(whole.shape) == 1:
            return whole
        held = self._ckpt.read_rows(name, start, stop)
        scales = whole.scales
        if scales is not None and whole.format.block is not None:
            b = whole.format.block[0]
            scales = scales[start // b : -(-stop // b)]
        return replace(whole, shape=held.shape, codes=whole.codes[start:stop], scales=scales)


@dataclass(frozen=True)
class Flip:
    """Bits of one stored byte that flip: of a weight's codes, or of its scales."""

    name: str
    is_scale: bool
    byte: int
    mask: int

    def __call__(self, name: str, held: Tensor) -> Tensor:
        if name != self.name:
            return held
        part = "scales" if self.is_scale else "codes"
        array: NDArray[np.generic] = getattr(held, part).copy()
        array.reshape(-1).view(np.uint8)[self.byte] ^= np.uint8(self.mask)
        return replace(held, **{part: array})
