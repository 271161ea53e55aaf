"""The weights of the layer at hand, read ahead while the layer before is computed.

What is decoded here is small (vectors); matrices stay in their stored form and are decoded a few
rows at a time by the product that uses them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.config import ModelConfig
from dsv4_quant.formats.blocks import Tensor as Weight
from dsv4_quant.model.reading import Meter, stored_bytes

AHEAD_BYTES = 192 << 20
"""Bytes that may be read before they are asked for."""

READERS = 2
"""Threads that read: the disk has its next task while one of them hands over."""


class Source(Protocol):
    """What the model needs of a checkpoint; ``checkpoint.Checkpoint`` is one."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str) -> Weight: ...

    def read_rows(self, name: str, start: int, stop: int) -> Weight: ...

    def announce(self, name: str, start: int, stop: int) -> int: ...


class Rows(NamedTuple):
    """Some rows of a matrix, in the place of the whole."""

    name: str
    start: int
    stop: int


Wanted = str | Rows
"""A tensor's name, or some of its rows."""


class Reader:
    """Reads tensors, and beforehand those that were announced; a context manager.

    It is used from one thread; what was announced is read on others.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.meter = Meter()
        self._pool = ThreadPoolExecutor(READERS, "reader")
        self._announced: deque[Wanted] = deque()
        self._reading: dict[Wanted, Future[Weight]] = {}
        self._held = 0

    def announce(self, wanted: Iterable[Wanted]) -> None:
        """These will be asked for, once each and about in this order; reading them starts now."""
        self._announced.extend(wanted)
        self._start()

    def read(self, wanted: Wanted) -> Weight:
        """A whole tensor or some rows; waits for it if it is on its way."""
        with self.meter.waiting():
            if wanted in self._reading:
                weight = self._reading.pop(wanted).result()
                self._held -= self._size(wanted)
            else:
                if wanted in self._announced:
                    self._announced.remove(wanted)
                weight = self._fetch(wanted)
        self._start()
        return weight

    def _start(self) -> None:
        while self._announced and self._held < AHEAD_BYTES:
            wanted = self._announced.popleft()
            self.source.announce(*self._rows(wanted))  # to the disk, ahead of the readers
            self._reading[wanted] = self._pool.submit(self._fetch, wanted)
            self._held += self._size(wanted)

    def _fetch(self, wanted: Wanted) -> Weight:
        with self.meter.reading():
            weight = (
                self.source.read_rows(*wanted)
                if isinstance(wanted, Rows)
                else self.source.read(wanted)
            )
        self.meter.add(weight.nbytes)
        return weight

    def _rows(self, wanted: Wanted) -> Rows:
        if isinstance(wanted, Rows):
            return wanted
        return Rows(wanted, 0, self.source.specs[wanted].matrix[0])

    def _size(self, wanted: Wanted) -> int:
        name, start, stop = self._rows(wanted)
        spec = self.source.specs[name]
        return stored_bytes(spec) * (stop - start) // spec.matrix[0]

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
