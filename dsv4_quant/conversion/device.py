"""``--device``: the casts on a GPU, checked against the processor's while they run.

What the device cannot answer plainly (a value that is not exact, a NaN) is cast by the processor,
which also finds the words for an error; so are scales that are made of scales alone, and rounding
to BF16, which few weights need. And of each operation every thread has its first panel, and then
one in CHECK_EVERY, cast by both: a driver, a compiler or a chip that computes something else ends
the conversion instead of spoiling it.

PyTorch is imported when a device is asked for, not before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from dsv4_quant.conversion.casts import Casts, OnProcessor
from dsv4_quant.conversion.operations import Panel, Proof
from dsv4_quant.conversion.plan import COPY
from dsv4_quant.errors import MiscomputedError, UsageError
from dsv4_quant.formats import e8m0
from dsv4_quant.formats.blocks import Tensor

if TYPE_CHECKING:
    from dsv4_quant.conversion.requantise import Rounded
    from dsv4_quant.formats.rules import ScaleRule
    from dsv4_quant.kernels.device_casts_torch import DeviceCasts

Device = Literal["cpu", "cuda"]

CHECK_EVERY = 64
"""Costs the processor about a sixtieth of the casts."""

Array = NDArray[Any]


def casts_on(device: Device, local: int = 0) -> Callable[[], Casts]:
    """What makes a thread's casts. Raises UsageError where the device cannot be used.

    ``local``: which process of its machine this is: each takes a GPU of its own.
    """
    if device == "cpu":
        return OnProcessor
    try:
        from dsv4_quant.kernels import device_casts_torch as there
        from dsv4_quant.kernels import gpu_torch
    except ImportError as error:
        raise UsageError(
            f"No CUDA device can be used: PyTorch cannot be loaded ({error})",
            hint="--device cpu does the same on the processor.",
        ) from None
    gpu = gpu_torch.find_gpu(local)
    return lambda: OnDevice(there.DeviceCasts(gpu), CHECK_EVERY)


class OnDevice:
    """One thread's casts on a device; of each kind the first of ``every`` so many is checked."""

    def __init__(self, there: DeviceCasts, every: int) -> None:
        self._there, self._here = there, OnProcessor()
        self._every, self._cast = every, Counter[str]()

    def weight(self, operation: str, panel: Panel, proof: Proof) -> Array:
        """See Casts."""
        made, found = self._exact(operation, panel)
        if made is None:
            return self._here.weight(operation, panel, proof)
        if self._is_due(operation):
            wanted = Proof()
            self._compare(panel, self._here.weight(operation, panel, wanted), made)
            if (wanted.tiles, wanted.spreads) != (found.tiles, found.spreads):
                raise _differs(panel)
        proof.add(found)
        return made

    def _exact(self, operation: str, panel: Panel) -> tuple[Array | None, Proof]:
        held, after = panel.tensor, panel.after
        if operation == COPY:
            return None, Proof()
        if after.kind == "bf16":
            return self._there.to_bf16(held), Proof()
        h, w = after.scale_shape((held.codes.shape[0], held.shape[1]))
        if operation == "fp4_to_fp8":
            codes, spreads = self._there.fp4_to_fp8(held, after) or (None, Counter[int]())
            return codes, Proof(h * w, spreads)
        codes, _ = self._there.encode(held, after) or (None, None)
        return codes, Proof(h * w)

    def scale(self, operation: str, panel: Panel) -> Array:
        """See Casts. FP8's of FP4's are made of scales alone, which is not worth the way."""
        if operation == "fp4_to_fp8":
            return self._here.scale(operation, panel)
        made = self._there.encode(panel.tensor, panel.after)
        if made is None:
            return self._here.scale(operation, panel)
        scales = _as_held(panel, made[1])
        if self._is_due(f"{operation} scales"):
            self._compare(panel, self._here.scale(operation, panel), scales)
        return scales

    def requantise(self, panel: Panel, rule: ScaleRule) -> Rounded:
        """See Casts."""
        made = self._rounded(panel, rule)
        if made is None:
            return self._here.requantise(panel, rule)
        if self._is_due(f"{panel.tensor.format} rounded"):
            wanted = self._here.requantise(panel, rule)
            assert wanted.tensor.scales is not None and made.tensor.scales is not None
            self._compare(panel, wanted.tensor.codes, made.tensor.codes)
            self._compare(panel, wanted.tensor.scales, made.tensor.scales)
            for part in fields(wanted.figures):
                self._compare(
                    panel, getattr(wanted.figures, part.name), getattr(made.figures, part.name)
                )
        return made

    def rounded_scales(self, panel: Panel, rule: ScaleRule) -> Array:
        """See Casts."""
        made = self._rounded(panel, rule)
        if made is None:
            return self._here.rounded_scales(panel, rule)
        assert made.tensor.scales is not None
        if self._is_due(f"{panel.tensor.format} rounded scales"):
            self._compare(panel, self._here.rounded_scales(panel, rule), made.tensor.scales)
        return made.tensor.scales

    def _rounded(self, panel: Panel, rule: ScaleRule) -> Rounded | None:
        from dsv4_quant.conversion.requantise import LARGE_SCALE, Rounded  # kernels only for this

        held, after = panel.tensor, panel.after
        if after.kind == "bf16":
            return None
        made = self._there.quantise(held, after, rule)
        if made is None:
            return None
        codes, scales, figures = made
        if scales.max(initial=0) >= LARGE_SCALE["fp4" if after.kind == "fp4" else "fp8"]:
            return None  # it may have to be refused, which takes words
        shape = held.codes.shape[0], held.shape[1]
        return Rounded(Tensor(after, shape, codes, _as_held(panel, scales)), figures)

    def _is_due(self, kind: str) -> bool:
        self._cast[kind] += 1
        return (self._cast[kind] - 1) % self._every == 0

    def _compare(self, panel: Panel, wanted: Array, made: Array) -> None:
        if wanted.tobytes() != made.tobytes():
            raise _differs(panel)


def _as_held(panel: Panel, scales: Array) -> Array:
    """Scale bytes as the output holds scales."""
    return e8m0.VALUES[scales] if panel.after.scale == "f32" else scales


def _differs(panel: Panel) -> MiscomputedError:
    return MiscomputedError(
        f"The device casts {panel.tensor.format} to {panel.after} otherwise than the processor",
        tensor=panel.name,
        hint="Nothing that it made is kept. Run the same command with --device cpu, and report the"
        " device, its driver and the versions of PyTorch and Triton.",
    )
