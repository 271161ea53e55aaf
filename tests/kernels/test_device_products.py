"""Products on another device: decoding and order are the processor's, and memory has a bound."""

from __future__ import annotations

from subprocess import CalledProcessError
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from triton.errors import TritonError

from dsv4_quant.errors import DeviceError
from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.formats.blocks import BF16, F32, FP4, Format, Tensor, fp8
from dsv4_quant.kernels import device_products_torch, ops
from dsv4_quant.kernels.device_products_torch import DeviceProducts
from dsv4_quant.kernels.gpu_torch import check_usable
from dsv4_quant.model.linear import Workers
from dsv4_quant.model.panels import decode_panel

FORMATS = [FP4, fp8((128, 128)), fp8((32, 32)), fp8((128, 128), "f32"), fp8((128, 64)), BF16, F32]
formats = pytest.mark.parametrize("form", FORMATS, ids=str)


def weight_of(form: Format, rows: int, cols: int) -> Tensor:
    """Random, with no NaN; sums and products round."""
    rng = np.random.default_rng(rows)
    values = rng.standard_normal((rows, cols), np.float32)
    if form == F32:
        return Tensor(form, (rows, cols), values)
    if form == BF16:
        return Tensor(form, (rows, cols), (values.view(np.uint32) >> 16).astype(np.uint16))
    codes = rng.integers(0, 256, (rows, cols // 2 if form.kind == "fp4" else cols), np.uint8)
    if form.kind == "fp8":
        codes[np.isin(codes, e4m3.NAN_CODES)] = 0
    scales: NDArray[Any] = rng.integers(117, 137, form.scale_shape((rows, cols)), np.uint8)
    if form.scale == "f32":
        scales = e8m0.VALUES[scales] * np.float32(0.3)
    return Tensor(form, (rows, cols), codes, scales)


def on_processor(x: NDArray[np.float32], weight: Tensor, *place: Any) -> bytes:
    first, last, block = place
    with Workers(1) as workers:
        return bytes(workers.linear(torch.from_numpy(x), weight, (first, last), block).numpy())


def all_codes(form: Format) -> Tensor:
    """Every code times every scale: a row for each scale."""
    codes = np.arange(256, dtype=np.uint8)[None].repeat(256, 0)
    if form.kind == "fp4":
        block = Format("fp4", (1, 512), "e8m0")
        return Tensor(block, (256, 512), codes, np.arange(256, dtype=np.uint8)[:, None])
    if form.scale == "e8m0":
        block = fp8((1, 256))
        return Tensor(block, (256, 256), codes, np.arange(256, dtype=np.uint8)[:, None])
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 256, np.uint32)  # of all sizes, NaN and infinity, too
    bits[:6] = 0, 1, 0x80000000, 0x7F7FFFFF, 0x007FFFFF, 0x7F800000
    return Tensor(fp8((1, 256), "f32"), (256, 256), codes, bits.view(np.float32)[:, None])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", [FP4, fp8((1, 256)), fp8((1, 256), "f32")], ids=str)
def test_every_code_and_scale_is_decoded_as_the_processor_does(
    form: Format, backend: Any, device: torch.device
) -> None:
    weight = all_codes(form)
    parts = (torch.from_numpy(part).to(device) for part in (weight.codes, weight.scales))
    found = ops.block_dequant(*parts, weight.format, torch.float32, backend=backend).cpu().numpy()
    block = weight.format.block
    assert block is not None and weight.scales is not None
    if form.kind == "fp4":  # the processor's loop knows blocks of 32
        weight = Tensor(FP4, weight.shape, weight.codes, weight.scales.repeat(16, 1))
    wanted = np.empty(weight.shape, np.float32)
    decode_panel(weight, 0, 256, wanted)
    nan = np.isnan(wanted)
    assert (np.isnan(found) == nan).all() and not nan.all()
    assert found[~nan].tobytes() == wanted[~nan].tobytes()


@formats
def test_any_rows(form: Format, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, in panels of a few rows, and in parts, too; none of them begins with the blocks."""
    x = np.random.default_rng(0).standard_normal((5, 320), np.float32)
    weight, there = weight_of(form, 300, 320), DeviceProducts(device)
    monkeypatch.setenv(ops.VARIABLE, "torch")
    for first, last, block in [(0, 300, 64), (0, 300, None), (100, 290, 64), (127, 129, 64)]:
        wanted = on_processor(x, weight, first, last, block)
        assert there.linear(x, weight, first, last, block).tobytes() == wanted
        with monkeypatch.context() as patch:
            patch.setattr(device_products_torch, "PANEL_BYTES", 40 * 320 * 4)
            assert there.linear(x, weight, first, last, block).tobytes() == wanted
            patch.setattr(device_products_torch, "PART_BYTES", 3 * 320 * 4)
            assert there.linear(x, weight, first, last, block).tobytes() == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@formats
def test_on_a_gpu(form: Format) -> None:
    x = np.random.default_rng(0).standard_normal((70, 1100 // 32 * 32), np.float32)
    weight, there = weight_of(form, 300, x.shape[1]), DeviceProducts(torch.device("cuda"))
    for first, last, block in [(0, 300, 1024), (0, 300, None), (127, 129, 1024)]:
        wanted = on_processor(x, weight, first, last, block)
        assert there.linear(x, weight, first, last, block).tobytes() == wanted


@formats
def test_memory_has_a_bound(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is sent, decoded and made at a time."""
    limit = 64 * 128 * 4
    monkeypatch.setattr(device_products_torch, "PART_BYTES", limit)
    monkeypatch.setattr(device_products_torch, "PANEL_BYTES", limit)
    there, sizes = DeviceProducts(torch.device("cpu")), []
    run = there._lane.run

    def spy(compute: Any, *arrays: Any) -> Any:
        made = run(compute, *arrays)
        sizes.append([arrays[0].nbytes, sum(part.nbytes for part in arrays[1:]), made[0].nbytes])
        return made

    decoded: list[int] = []

    def watch(x: torch.Tensor, w: torch.Tensor, block: int | None) -> torch.Tensor:
        decoded.append(w.nbytes)
        return x @ w.T  # sizes matter here, and not the order of sums

    monkeypatch.setattr(there._lane, "run", spy)
    monkeypatch.setattr(ops, "ordered_gemm", watch)
    x, weight = np.ones((200, 128), np.float32), weight_of(form, 384, 128)
    there.linear(x, weight, 0, 384, 64)
    rows = form.block[0] if form.block else 1  # of blocks, one at least
    assert max(size[0] for size in sizes) <= limit
    assert max(size[1] for size in sizes) <= max(limit, rows * 128 * 4)
    assert max(size[2] for size in sizes) <= max(limit, rows * 64 * 4)
    assert max(decoded) <= max(limit, rows * 128 * 4)
    assert sum(size[2] for size in sizes) == 4 * 200 * 384


def test_failures_are_one_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = np.ones((1, 32), np.float32), weight_of(FP4, 8, 32)

    def said(error: Exception) -> str:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(ops, "ordered_gemm", fail)
        with pytest.raises(DeviceError) as caught:
            DeviceProducts(torch.device("cpu")).linear(x, weight, 0, 8, None)
        return str(caught.value)

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert said(full) == (
        "The device cpu has too little free memory. Make room there, or take --device cpu."
    )
    assert said(torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")) == (
        "The device cpu failed: CUDA error: unspecified launch failure. Run the same command"
        " again, or with --device cpu."
    )
    assert said(TritonError("out of resource: shared memory")) == (
        "The device cpu failed: out of resource: shared memory. Run the same command again, or with"
        " --device cpu."
    )
    assert "failed: Command 'ptxas'" in said(CalledProcessError(1, "ptxas"))
    assert "failed: [Errno 28]" in said(OSError(28, "no room for compiled kernels"))
    monkeypatch.setattr(ops, "ordered_gemm", lambda x: x)
    with pytest.raises(TypeError):  # that is our own mistake
        DeviceProducts(torch.device("cpu")).linear(x, weight, 0, 8, None)


def test_a_cpu_is_usable() -> None:
    assert check_usable(torch.device("cpu")) == torch.device("cpu")
