"""Products on a GPU, checked against the processor's while they run.

Only products go there: exp, softmax and their like would round otherwise. The order of every sum
is the processor's (``dot``), so all bits are, too: a pass with a GPU and one without are the same,
and so are their fingerprints. The GPU is asked to show that before it is used, with random
operands in every format; then the first product of every kind and one in CHECK_EVERY is computed
by the processor as well, at some places that are drawn anew each time. Because the bits are the
same, the processor can go on at any product where a GPU fails that nobody insisted on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Literal

import numpy as np
import torch

from dsv4_quant.config import FP8_BLOCK
from dsv4_quant.errors import DeviceError, Dsv4Error, MiscomputedError
from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.formats.blocks import BF16, F32, FP4, Format, fp8
from dsv4_quant.formats.blocks import Tensor as Weight
from dsv4_quant.kernels import gpu_torch
from dsv4_quant.kernels.device_products_torch import DeviceProducts
from dsv4_quant.model.dot import BLOCK
from dsv4_quant.model.linear import Products, Workers

Device = Literal["auto", "cpu", "cuda"]

WORTHWHILE = 1 << 24
"""Multiplications per thread of the processor up to which a product stays with it: half a
millisecond, in which one expert gets to a device and back. An estimate; it moves no bit."""

CHECK_EVERY = 16

CHECKED = 16
"""Rows of x, and of the weight, whose products are compared: a thousandth of most products."""

TESTED = (FP4, fp8(FP8_BLOCK), fp8(FP8_BLOCK, "f32"), BF16, F32)
"""What a GPU must be right in before it is used."""


@contextmanager
def products_on(
    device: Device,
    threads: int | None = None,
    *,
    local: int = 0,
    refused: Callable[[str], None] = lambda why: None,
) -> Iterator[Products]:
    """What computes a pass's products while the block runs.

    Args:
        device: cpu; cuda, a GPU or an error; auto, a GPU where there is one that can be used and
            passes its test, otherwise the processor, which also goes on where the GPU fails.
        threads: of the processor; they change no bit.
        local: which process of its machine this is: each takes a GPU of its own.
        refused: with auto it is told why a GPU that is there is not used, or not any more.

    Raises:
        UsageError: cuda, and there is no GPU that can be used.
        DeviceError: cuda, and the GPU fails.
        MiscomputedError: it computes something else; with auto only after it passed its test.
    """
    with Workers(threads) as workers:
        yield _chosen(device, workers, local, refused)


def _chosen(
    device: Device, workers: Workers, local: int, refused: Callable[[str], None]
) -> Products:
    if device == "cpu" or (device == "auto" and not gpu_torch.has_gpu()):
        return workers
    try:
        there = _tested(gpu_torch.find_gpu(local), workers)
    except Dsv4Error as error:
        if device == "cuda":
            raise
        refused(f"The processor computes, not the GPU. {error.what}")
        return workers
    return OnDevice(there, workers, left=refused if device == "auto" else None)


def _tested(device: torch.device, workers: Workers) -> DeviceProducts:
    try:
        there = DeviceProducts(device)
        check_products(there, workers)
    except Dsv4Error:
        raise
    except Exception as error:  # whatever a compiler or a driver may throw
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DeviceError(
            f"The device {device} does not pass its test: {said}", hint=gpu_torch.ON_CPU
        ) from error
    return there


class OnDevice:
    """Products of a device; small ones, and samples for comparison, of the processor.

    Of the device's memory they hold what ``DeviceProducts`` says. Raises MiscomputedError where a
    comparison fails, and DeviceError where the device does; with ``left`` the processor goes on
    then, and it is told why.
    """

    def __init__(
        self,
        there: DeviceProducts,
        workers: Workers,
        every: int = CHECK_EVERY,
        left: Callable[[str], None] | None = None,
    ) -> None:
        self.device = there.name
        self._there: DeviceProducts | None = there
        self._workers, self._left = workers, left
        self._every, self._made = every, Counter[tuple[Format, bool]]()
        self._places = Random(0)

    def linear(
        self,
        x: torch.Tensor,
        weight: Weight,
        rows: tuple[int, int] | None = None,
        block: int | None = BLOCK,
    ) -> torch.Tensor:
        """See Products."""
        first, last = rows or (0, weight.shape[0])
        flat = x.reshape(-1, x.shape[-1])  # [M, K]
        is_small = flat.numel() * (last - first) <= WORTHWHILE * self._workers.threads
        if is_small or self._there is None:
            return self._workers.linear(x, weight, rows, block)
        try:
            made = torch.from_numpy(self._there.linear(flat.numpy(), weight, first, last, block))
        except DeviceError as error:
            if self._left is None:
                raise
            self._left(f"The processor goes on without the GPU. {error.what}")
            self._there, self.device = None, f"{self.device}, then {self._workers.device}"
            return self._workers.linear(x, weight, rows, block)
        kind = weight.format, block is None
        self._made[kind] += 1
        if (self._made[kind] - 1) % self._every == 0:
            self._check(flat, weight, first, block, made)
        return made.reshape(*x.shape[:-1], last - first)

    def _check(
        self, x: torch.Tensor, weight: Weight, first: int, block: int | None, made: torch.Tensor
    ) -> None:
        """Compares a few rows of x times a few rows of the weight that lie together."""
        m, n = made.shape
        some = sorted(self._places.sample(range(m), min(m, CHECKED)))
        start = self._places.randrange(max(n - CHECKED, 0) + 1)
        stop = min(start + CHECKED, n)
        wanted = self._workers.linear(x[some], weight, (first + start, first + stop), block)
        if not same_bits(made[some, start:stop], wanted):
            raise _differs(self.device, weight.format)


def check_products(there: DeviceProducts, workers: Workers) -> None:
    """Random products in every format, numbers of all sizes, against the processor's.

    Raises MiscomputedError where a bit differs.
    """
    draw = np.random.default_rng(0)
    m, n, k = 33, 136, 1056  # all ragged: tiles, blocks of scales, blocks of sums
    sizes = -np.linspace(0, 145, m).astype(np.int32)  # down to numbers below the normal ones
    x = np.ldexp(draw.standard_normal((m, k), np.float32), sizes[:, None])
    for form in TESTED:
        weight = random_weight(form, (n, k), draw)
        for first, last, block in ((3, n, BLOCK), (0, n - 7, None)):
            made = there.linear(x, weight, first, last, block)
            wanted = workers.linear(torch.from_numpy(x), weight, (first, last), block)
            if not same_bits(torch.from_numpy(made), wanted):
                raise _differs(there.name, form)


def random_weight(form: Format, shape: tuple[int, int], draw: np.random.Generator) -> Weight:
    """Codes of every kind but NaN; scales from 2**-27 to 2."""
    rows, cols = shape
    if form.kind in ("f32", "bf16"):
        values = draw.standard_normal(shape, np.float32)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return Weight(form, shape, values if form.kind == "f32" else bits)
    codes = draw.integers(0, 256, (rows, cols // 2 if form.kind == "fp4" else cols), np.uint8)
    if form.kind == "fp8":
        codes[np.isin(codes, e4m3.NAN_CODES)] = 0
    scales = draw.integers(e8m0.BIAS - 27, e8m0.BIAS + 1, form.scale_shape(shape), np.uint8)
    if form.scale == "f32":  # no powers of two: each value is rounded
        factors = draw.uniform(1, 2, scales.shape) * e8m0.VALUES[scales]
        return Weight(form, shape, codes, factors.astype(np.float32))
    return Weight(form, shape, codes, scales)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two float32 tensors are equal bit for bit; any NaN equals any NaN."""
    bits, others = (part.contiguous().view(torch.int32) for part in (one, other))
    return bool(((bits == others) | (one.isnan() & other.isnan())).all())


def _differs(name: str, form: Format) -> MiscomputedError:
    return MiscomputedError(
        f"The device {name} multiplies {form} weights otherwise than the processor",
        hint="The pass is void. Take --device cpu, and report the device, its driver and the"
        " versions of PyTorch and Triton.",
    )
