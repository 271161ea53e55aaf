"""The weights of the layer at hand, read ahead while the layer before is computed.

What is decoded here is small (vectors); matrices stay in their stored form and are decoded a few
rows at a time by the product that uses them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import torch

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.config import ModelConfig
from dsv4_quant.formats.blocks import BITS
from dsv4_quant.formats.blocks import Tensor as Weight

AHEAD_BYTES = 192 << 20
"""Bytes that may be read before they are asked for."""


class Source(Protocol):
    """What the model needs of a checkpoint; ``checkpoint.Checkpoint`` is one."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str) -> Weight: ...

    def read_rows(self, name: str, start: int, stop: int) -> Weight: ...


class Reader:
    """Reads tensors by name, and beforehand those that were announced; a context manager.

    It is used from one thread; the reads themselves run on another.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._pool = ThreadPoolExecutor(1, "reader")
        self._announced: deque[str] = deque()
        self._reading: dict[str, Future[Weight]] = {}
        self._held = 0

    def announce(self, names: Iterable[str]) -> None:
        """These will be asked for, once each and about in this order; reading them starts now."""
        self._announced.extend(names)
        self._start()

    def read(self, name: str) -> Weight:
        """A whole tensor; waits for it if it is on its way."""
        if name not in self._reading:
            if name in self._announced:
                self._announced.remove(name)
            return self.source.read(name)
        weight = self._reading.pop(name).result()
        self._held -= self._bytes(name)
        self._start()
        return weight

    def _start(self) -> None:
        while self._announced and self._held < AHEAD_BYTES:
            name = self._announced.popleft()
            self._reading[name] = self._pool.submit(self.source.read, name)
            self._held += self._bytes(name)

    def _bytes(self, name: str) -> int:
        spec = self.source.specs[name]
        return prod(spec.shape) * BITS[spec.format.kind] // 8

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Weights:
    """The tensors whose names begin with a prefix, such as ``layers.3.`` or nothing."""

    reader: Reader
    prefix: str = ""

    def matrix(self, name: str) -> Weight:
        """A matrix in its stored form."""
        return self.reader.read(self.prefix + name)

    def vector(self, name: str) -> torch.Tensor:
        """A norm's weight, a bias or another small tensor, float32."""
        return torch.from_numpy(self.matrix(name).decode())

    def table(self, name: str) -> torch.Tensor:
        """A table of integers, int64."""
        return torch.from_numpy(self.matrix(name).codes.astype(np.int64, copy=False))

    def under(self, name: str) -> Weights:
        """The tensors whose names go on with ``name``."""
        return Weights(self.reader, self.prefix + name)
