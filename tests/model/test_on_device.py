"""A forward pass whose products a device computes: the same bits, watched, and never by surprise.

Here the device is a CPU: the same code, but for pinned memory and streams, with the product's
definition in PyTorch, or its Triton twin in the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.errors import DeviceError, MiscomputedError, UsageError
from dsv4_quant.formats.blocks import F32
from dsv4_quant.kernels import gpu_torch, ops
from dsv4_quant.kernels.device_products_torch import DeviceProducts
from dsv4_quant.model import Observer, Result, forward, on_device
from dsv4_quant.model.forward import one_torch_thread
from dsv4_quant.model.linear import Workers, as_weight
from dsv4_quant.model.on_device import OnDevice, check_products, products_on, same_bits
from tests.folders import golden
from tests.model.random_model import random_source, tokens

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
LENGTHS = [1, 9]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch's own threads would wait for each other's small pieces."""
    with one_torch_thread():
        yield


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """``device="cuda"`` is a CPU that passes its test; gives the rows of every product there."""
    monkeypatch.setattr(gpu_torch, "find_gpu", lambda local: CPU)
    monkeypatch.setattr(on_device, "check_products", lambda there, workers: None)
    monkeypatch.setattr(on_device, "WORTHWHILE", 0)
    monkeypatch.setenv(ops.VARIABLE, "torch")
    return counted(monkeypatch)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of x each product of a device has."""
    plain, found = DeviceProducts.linear, list[int]()

    def spy(self: DeviceProducts, x: Any, *rest: Any) -> Any:
        found.append(len(x))
        return plain(self, x, *rest)

    monkeypatch.setattr(DeviceProducts, "linear", spy)
    return found


def equal(found: Result, expected: Result) -> None:
    for ours, theirs in (
        (found.logits, expected.logits),
        (found.mtp_logits or [], expected.mtp_logits or []),
    ):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape and one.isfinite().all() and same_bits(one, other)
    assert found.experts_hit == expected.experts_hit


RUNS: list[dict[str, Any]] = [
    {"mtp": True, "decode": 3},
    {"arithmetic": "deployed", "activations": "bfloat16", "decode": 2},
]
runs = pytest.mark.parametrize("run", RUNS, ids=str)
CASES = ["tiny-fp4", "tiny-base", "bf16"]  # experts in FP4, in FP8 with float32 scales, in BF16


def passes(case: str, run: dict[str, Any]) -> tuple[Result, Result]:
    """The processor's, and the device's."""
    if case == "bf16":
        source = random_source(1, num_nextn_predict_layers=1, compress_ratios=[0, 4, 16, 4, 0])
        prompts = [tokens(source, length, seed=length) for length in LENGTHS]
        return forward(source, prompts, device="cpu", **run), forward(
            source, prompts, device="cuda", **run
        )
    with Checkpoint.open(golden(case)) as ckpt:
        prompts = [tokens(ckpt, length, seed=length) for length in LENGTHS]
        expected = forward(ckpt, prompts, device="cpu", **run)
        return expected, forward(ckpt, prompts, device="cuda", **run)


@runs
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_the_processor_s(
    case: str, run: dict[str, Any], on_torch: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the device has computed all products, but for a few rows that are compared."""
    plain, rows = Workers.linear, list[int]()

    def spy(self: Workers, x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        rows.append(x.shape[:-1].numel())
        return plain(self, x, *rest, **more)

    monkeypatch.setattr(Workers, "linear", spy)
    expected, found = passes(case, run)
    equal(found, expected)
    assert len(rows) > len(on_torch) > 100
    assert max(rows[len(on_torch) :]) <= on_device.CHECKED < max(on_torch)


@needs_gpu
@runs
@pytest.mark.parametrize("case", CASES)
def test_the_bits_on_a_gpu(case: str, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "WORTHWHILE", 0)
    expected, found = passes(case, run)
    equal(found, expected)
    assert torch.cuda.get_device_name() in found.reading.device
    assert expected.reading.device == "cpu"


@needs_gpu
def test_a_gpu_passes_its_test() -> None:
    with products_on("auto", refused=pytest.fail) as products:
        assert isinstance(products, OnDevice)


INTERPRETED = """
import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from dsv4_quant.kernels import gpu_torch
from dsv4_quant.kernels.fma_torch import fma
from dsv4_quant.model import forward, on_device
from tests.model.random_model import random_source, tokens

def create(self, *operands):  # the interpreter's own rounds twice
    values = (torch.from_numpy(np.array(operand.data)) for operand in operands)
    return TensorHandle(fma(*values).numpy(), operands[-1].dtype.scalar)

InterpreterBuilder.create_fma = create
gpu_torch.find_gpu = lambda local: torch.device("cpu")
on_device.check_products = lambda there, workers: None
on_device.WORTHWHILE = 0
source = random_source(
    3, num_hidden_layers=2, compress_ratios=[0, 4], hidden_size=32, vocab_size=40,
    n_routed_experts=3, hc_mult=2,
)
prompts = [tokens(source, 6)]
for run in ({"decode": 1}, {"arithmetic": "deployed"}):
    wanted = forward(source, prompts, device="cpu", **run).logits[0]
    found = forward(source, prompts, device="cuda", **run).logits[0]
    assert on_device.same_bits(found, wanted)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests on a GPU compile and run it")
def test_the_bits_of_triton() -> None:
    environment = {"TRITON_INTERPRET": "1", ops.VARIABLE: "triton", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", INTERPRETED],
        env=os.environ | environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


class Notes(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


class TestChoices:
    """Who computes, and what is said about it."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_torch, "has_gpu", lambda: False)

    def run(self, device: Any) -> tuple[str, list[str]]:
        """What computed, and what was told."""
        notes = Notes()
        result = forward(random_source(), [[1, 2, 3]], device=device, observer=notes)
        return result.reading.device, notes.told

    def test_without_a_gpu(self) -> None:
        assert self.run("auto") == self.run("cpu") == ("cpu", [])
        with pytest.raises(UsageError) as caught:
            self.run("cuda")
        assert str(caught.value) == (
            "No CUDA device can be used here. --device cpu does the same on the processor."
        )

    def test_cpu_never_looks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("has_gpu", "find_gpu"):
            monkeypatch.setattr(gpu_torch, name, pytest.fail)
        assert self.run("cpu") == ("cpu", [])

    def test_a_gpu_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_torch, "has_gpu", lambda: True)
        monkeypatch.setattr(gpu_torch, "find_gpu", lambda local: CPU)
        plain = DeviceProducts.__init__

        def named(self: DeviceProducts, device: torch.device) -> None:
            plain(self, device)
            self.name = "NVIDIA X (cuda:0)"

        monkeypatch.setattr(DeviceProducts, "__init__", named)
        assert self.run("auto") == ("NVIDIA X (cuda:0)", [])
        monkeypatch.setattr(on_device, "check_products", lambda there, workers: None)
        assert self.run("cuda") == ("NVIDIA X (cuda:0)", [])

    def test_a_gpu_that_cannot_be_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(local: int) -> torch.device:
            raise UsageError("No CUDA device can be used: it is asleep")

        monkeypatch.setattr(gpu_torch, "has_gpu", lambda: True)
        monkeypatch.setattr(gpu_torch, "find_gpu", refuse)
        told = "The processor computes, not the GPU. No CUDA device can be used: it is asleep"
        assert self.run("auto") == ("cpu", [told])
        with pytest.raises(UsageError, match="asleep"):
            self.run("cuda")

    def test_a_gpu_that_rounds_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def twice(x: torch.Tensor, w: torch.Tensor, block: int | None) -> torch.Tensor:
            return x @ w.T

        monkeypatch.setattr(gpu_torch, "has_gpu", lambda: True)
        monkeypatch.setattr(gpu_torch, "find_gpu", lambda local: CPU)
        monkeypatch.setattr(ops, "ordered_gemm", twice)
        told = "The processor computes, not the GPU. The device cpu multiplies fp4 1x32 e8m0"
        device, notes = self.run("auto")
        assert device == "cpu" and len(notes) == 1 and notes[0].startswith(told)
        with pytest.raises(MiscomputedError, match=r"otherwise than the processor.*--device cpu"):
            self.run("cuda")

    def test_a_compiler_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise KeyError("no such architecture\nand more")

        monkeypatch.setattr(gpu_torch, "has_gpu", lambda: True)
        monkeypatch.setattr(gpu_torch, "find_gpu", lambda local: CPU)
        monkeypatch.setattr(ops, "ordered_gemm", fail)
        assert self.run("auto")[0] == "cpu"
        with pytest.raises(DeviceError, match=r"does not pass its test: .no such architecture"):
            self.run("cuda")

    def test_a_gpu_that_fails_on_the_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What it made is kept, the processor goes on, and the bits are the same."""
        monkeypatch.setattr(gpu_torch, "has_gpu", lambda: True)
        monkeypatch.setattr(gpu_torch, "find_gpu", lambda local: CPU)
        monkeypatch.setattr(on_device, "check_products", lambda there, workers: None)
        monkeypatch.setattr(on_device, "WORTHWHILE", 0)
        plain, made = ops.ordered_gemm, list[int]()

        def fail(*operands: Any) -> torch.Tensor:
            made.append(1)
            if len(made) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(*operands)

        monkeypatch.setattr(ops, "ordered_gemm", fail)
        notes = Notes()
        found = forward(random_source(), [[1, 2, 3]], device="auto", observer=notes)
        told = "The processor goes on without the GPU. The device cpu has too little free memory"
        assert notes.told == [told] and len(made) == 21
        assert found.reading.device == "cpu, then cpu"
        equal(found, forward(random_source(), [[1, 2, 3]], device="cpu"))
        with pytest.raises(DeviceError, match="too little free memory"):
            self.run("cuda")

    def test_each_process_of_a_machine_takes_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []

        def find(local: int) -> torch.device:
            asked.append(local)
            raise UsageError("none")

        monkeypatch.setattr(gpu_torch, "find_gpu", find)
        with pytest.raises(UsageError):
            forward(random_source(), [[1]], device="cuda", local=5)
        assert asked == [5]

    def test_another_device(self) -> None:
        with pytest.raises(UsageError, match=r"No such device: tpu\. Choose auto, cpu or cuda"):
            self.run("tpu")


class TestChecks:
    """A device that computes something else is found out."""

    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    weight = as_weight(torch.randn(50, 64, generator=torch.Generator().manual_seed(1)))

    @pytest.fixture(autouse=True)
    def no_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(on_device, "WORTHWHILE", 0)
        monkeypatch.setenv(ops.VARIABLE, "torch")

    @pytest.mark.parametrize("flushes", [False, True])
    def test_its_own_test(self, flushes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The definition passes; without numbers below the normal ones it does not."""
        plain = ops.ordered_gemm

        def flushing(x: torch.Tensor, w: torch.Tensor, block: int | None) -> torch.Tensor:
            made = plain(x, w, block)
            return made.masked_fill(made.abs() < 2.0**-126, 0.0) if flushes else made

        monkeypatch.setattr(ops, "ordered_gemm", flushing)
        with Workers(1) as workers:
            if not flushes:
                check_products(DeviceProducts(CPU), workers)
                return
            with pytest.raises(MiscomputedError, match="fp4"):
                check_products(DeviceProducts(CPU), workers)

    def test_one_wrong_bit_in_every_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = DeviceProducts.linear

        def wrong(self: DeviceProducts, *args: Any) -> Any:
            made = plain(self, *args)
            made.view("u4")[:] ^= 1
            return made

        with Workers(1) as workers:
            products = OnDevice(DeviceProducts(CPU), workers, every=3)
            for _ in range(3):
                products.linear(self.x, self.weight)
            monkeypatch.setattr(DeviceProducts, "linear", wrong)
            with pytest.raises(MiscomputedError, match="multiplies f32 weights otherwise"):
                products.linear(self.x, self.weight)

    def test_one_wrong_bit_is_found_in_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A wrong column, always the same: the places that are compared move."""
        plain = DeviceProducts.linear

        def wrong(self: DeviceProducts, *args: Any) -> Any:
            made = plain(self, *args)
            made.view("u4")[:, 49] ^= 1
            return made

        monkeypatch.setattr(DeviceProducts, "linear", wrong)
        with Workers(1) as workers, pytest.raises(MiscomputedError):
            products = OnDevice(DeviceProducts(CPU), workers, every=1)
            for _ in range(1000):
                products.linear(self.x, self.weight)

    def test_the_first_of_every_kind_and_so_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain, checked = Workers.linear, list[int | None]()

        def spy(self: Workers, x: Any, weight: Any, rows: Any, block: Any) -> torch.Tensor:
            checked.append(block)
            return plain(self, x, weight, rows, block)

        monkeypatch.setattr(Workers, "linear", spy)
        with Workers(1) as workers:
            products = OnDevice(DeviceProducts(CPU), workers, every=4)
            for block in (64, 64, None, 64, 64, None, 64):
                products.linear(self.x, self.weight, (2, 40), block)
        assert checked == [64, None, 64]  # of the one kind the 1st and the 5th

    def test_small_products_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = counted(monkeypatch)
        monkeypatch.setattr(on_device, "WORTHWHILE", 40 * 64 * 50)
        with Workers(1) as workers:
            products = OnDevice(DeviceProducts(CPU), workers)
            wanted = workers.linear(self.x, self.weight)
            assert same_bits(products.linear(self.x, self.weight), wanted) and not rows
            twice = torch.cat((self.x, self.x)).view(2, 40, 64)
            made = products.linear(twice, self.weight)
            assert rows == [80] and made.shape == (2, 40, 50) and same_bits(made[1], wanted)

    def test_nan_is_no_difference(self) -> None:
        x = self.x.clone()
        x[::2, 3] = torch.nan
        with Workers(1) as workers:
            made = OnDevice(DeviceProducts(CPU), workers, every=1).linear(x, self.weight)
        assert made[::2].isnan().all() and made[1::2].isfinite().all()
        zeros = torch.tensor([0.0])
        assert same_bits(zeros, zeros) and not same_bits(zeros, -zeros)
        assert not same_bits(zeros, torch.tensor([torch.nan]))
        assert self.weight.format == F32
