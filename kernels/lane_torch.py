"""A thread's way to another device and back: arrays in, what is made of them there, arrays out.

Each lane has a stream of its own and works in order on it: copy in, compute, copy out, wait. What
overlaps are the lanes of several threads, and the waiting thread holds neither a core nor Python's
lock. Both copies start and end in pinned memory, which the device reads and writes by itself while
the processor goes on; a lane uses it again for every panel.

On a CPU a lane takes the same steps in ordinary memory. So its tests need no GPU, and what they
cannot reach is what stands behind ``is_gpu`` and ``_stream``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from subprocess import SubprocessError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv4_quant.errors import DeviceError

Array = NDArray[Any]

ALIGNED = 256
"""Bytes; arrays begin at multiples of it: kernels load 16 bytes at once."""

TYPES = {np.uint8: torch.uint8, np.uint16: torch.bfloat16, np.float32: torch.float32}
"""What arrays are on the device: a uint16 holds the bits of a BF16."""
ARRAYS = {torch.bfloat16: np.uint16, torch.int32: np.int32, torch.float64: np.float64} | {
    torch.uint8: np.uint8,
    torch.float32: np.float32,
}

_LAUNCHING = threading.Lock()
"""Triton compiles at a kernel's first launch, and its interpreter has one state for all threads."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What a user can do where a device fails; sentences."""

    full: str = "Make room there, or take --device cpu."
    failed: str = "Run the same command again, or with --device cpu."


class Lane:
    """One thread's; not shared."""

    def __init__(self, device: torch.device, hints: Hints | None = None) -> None:
        is_gpu = device.type == "cuda"
        self._device, self._hints = device, hints or Hints()
        self._stream = torch.cuda.Stream(device) if is_gpu else None  # type: ignore[no-untyped-call]
        self._inwards, self._outwards = _Staging(pinned=is_gpu), _Staging(pinned=is_gpu)

    def run(self, compute: Callable[..., Sequence[Tensor]], *arrays: Array) -> list[Array]:
        """``compute(*arrays)``, on the device: tensors in, tensors out; fresh arrays come back.

        Raises DeviceError where the device has too little memory or fails.
        """
        try:
            with torch.cuda.stream(self._stream):
                sent = self._send(arrays)
                with _LAUNCHING:
                    made = compute(*sent)
                return self._fetch(made)
        except Exception as error:
            if not _is_failure(error):
                raise
            raise _failure(error, self._device, self._hints) from error

    def _send(self, arrays: Sequence[Array]) -> list[Tensor]:
        """One copy for all; on a CPU it is no copy but the staging memory itself."""
        places = self._inwards.places([array.nbytes for array in arrays])
        staged = self._inwards.memory.numpy()
        for place, array in zip(places, arrays, strict=True):
            staged[place] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        used = self._inwards.memory[: places[-1].stop]
        there = used.to(self._device, non_blocking=True)
        return [
            there[place].view(TYPES[array.dtype.type]).view(array.shape)
            for place, array in zip(places, arrays, strict=True)
        ]

    def _fetch(self, made: Sequence[Tensor]) -> list[Array]:
        places = self._outwards.places([tensor.nbytes for tensor in made])
        for place, tensor in zip(places, made, strict=True):
            data = tensor.reshape(-1).view(torch.uint8)
            self._outwards.memory[place].copy_(data, non_blocking=True)
        if self._stream is not None:
            # it sleeps, where others would spin
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._stream)
            done.synchronize()
        staged = self._outwards.memory.numpy()
        return [
            staged[place].view(ARRAYS[tensor.dtype]).reshape(tensor.shape).copy()
            for place, tensor in zip(places, made, strict=True)
        ]


class _Staging:
    """Host memory that grows to the next power of two, as PyTorch hands out pinned memory anyway.

    Nothing is copied when it grows: what it held has been used.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self.memory = torch.empty(0, dtype=torch.uint8)

    def places(self, sizes: Sequence[int]) -> list[slice]:
        """Where so many bytes lie in the memory, one after the other."""
        room = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        starts = list(accumulate(room, initial=0))
        if starts[-1] > self.memory.numel():
            whole = 1 << (starts[-1] - 1).bit_length()
            self.memory = torch.empty(whole, dtype=torch.uint8, pin_memory=self._pinned)
        return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]


def _is_failure(error: Exception) -> bool:
    """Whether a driver, PyTorch or a kernel's compiler may have raised it; else it is our mistake.

    A kernel is compiled at its first launch with operands of a new kind, in the middle of work.
    """
    from_triton = any(kind.__module__.split(".")[0] == "triton" for kind in type(error).__mro__)
    return from_triton or isinstance(error, RuntimeError | OSError | SubprocessError)


def _failure(error: Exception, device: torch.device, hints: Hints) -> DeviceError:
    lines = str(error).strip().splitlines()
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return DeviceError(f"The device {device} has too little free memory", hint=hints.full)
    return DeviceError(
        f"The device {device} failed: {lines[0] if lines else type(error).__name__}",
        hint=hints.failed,
    )
