"""The products of the forward pass, and whole passes, on a device and on the processor.

Part of ``python -m benchmarks.kernels``. A product's kernel is timed with its operands on the
device, decoded; "whole" is what a pass waits for: to the device, decoding, product, back. Bits are
compared, too: a faster product that is another one ends the benchmark.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from benchmarks.conversion import DSV4
from benchmarks.timing import forget, run
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.config import FP8_BLOCK
from dsv4_quant.formats.blocks import BF16, FP4, Format, fp8
from dsv4_quant.formats.blocks import Tensor as Weight
from dsv4_quant.kernels import ops
from dsv4_quant.kernels.device_products_torch import DeviceProducts
from dsv4_quant.model.dot import BLOCK
from dsv4_quant.model.linear import Workers
from dsv4_quant.model.on_device import random_weight, same_bits

Shape = tuple[int, int]

WEIGHTS: dict[str, tuple[Format, Shape]] = {
    "an expert's w1": (FP4, (2048, 4096)),
    "wq_b": (fp8(FP8_BLOCK), (32768, 1024)),
    "8,192 rows of the head": (BF16, (8192, 4096)),
}
"""V4-Flash's, ``[N, K]``."""

ROWS = (1, 48, 1024)
"""A decode step, what an expert gets of 2,048 tokens, a prefill chunk."""

HEAD = f"{'product':34} {'kernel ms':>10} {'TFLOP/s':>8} {'GB/s':>6} {'whole ms':>9} {'CPU ms':>8}"
PASS_HEAD = f"{'forward pass, cold source':34} {'s':>10} {'waiting':>8} {'s of CPU':>9}"


def product_rows(
    device: torch.device,
    weights: dict[str, tuple[Format, Shape]] = WEIGHTS,
    rows: tuple[int, ...] = ROWS,
    seconds: Callable[[Callable[[], Any]], float] | None = None,
) -> Iterator[str]:
    """A line for each weight and number of rows. ``seconds`` times a kernel; None: as a whole."""
    draw, there = np.random.default_rng(0), DeviceProducts(device)
    with Workers() as workers:
        for name, (form, shape) in weights.items():
            weight = random_weight(form, shape, draw)
            w = torch.from_numpy(weight.decode()).to(device)
            for m in rows:
                x = torch.from_numpy(draw.standard_normal((m, shape[1]), np.float32))
                kernel = (seconds or _seconds)(_bind(x.to(device), w))
                whole = _seconds(lambda x=x, weight=weight: _whole(there, x, weight))
                here = _seconds(lambda x=x, weight=weight: workers.linear(x, weight))
                made = torch.from_numpy(_whole(there, x, weight))
                assert same_bits(made, workers.linear(x, weight)), f"{name}: other bits"
                work, moved = 2 * x.numel() * shape[0], x.nbytes + w.nbytes + made.nbytes
                title = f"{name}, {m:,} row{'s' if m > 1 else ''}"
                yield (
                    f"{title:34} {kernel * 1e3:10.3f} {work / kernel / 1e12:8.2f}"
                    f" {moved / kernel / 1e9:6.0f} {whole * 1e3:9.2f} {here * 1e3:8.2f}"
                )


def pass_rows(
    source: Path, folder: Path, rounds: int, devices: tuple[str, ...] = ("cpu", "cuda")
) -> Iterator[str]:
    """A line for each device: medians of whole commands, 2,048 tokens in 8 prompts."""
    with Checkpoint.open(source) as ckpt:
        vocabulary = range(ckpt.config.vocab_size)
    tokens, facts, made = folder / "tokens.json", folder / "facts.json", set[bytes]()
    draw = random.Random(0)
    tokens.write_text(json.dumps([draw.choices(vocabulary, k=256) for _ in range(8)]))
    for device in devices:
        found = []
        for _ in range(rounds):
            forget(source)
            logits = folder / "logits"
            words = ["forward", source, "--tokens", tokens, "--output", logits, "--device", device]
            done = run([*DSV4, *map(str, words), "--json", str(facts), "--quiet"])
            reading = json.loads(facts.read_text())["reading"]
            found.append((reading["seconds"], reading["waiting_seconds"], done.cpu))
            made.add(blake3(logits.read_bytes()).digest())
            assert len(made) == 1, f"{device}: other logits"
        took, waited, cpu = map(statistics.median, zip(*found, strict=True))
        yield f"{reading['device']:34} {took:10.2f} {waited:8.2f} {cpu:9.1f}"


def _whole(there: DeviceProducts, x: torch.Tensor, weight: Weight) -> Any:
    return there.linear(x.numpy(), weight, 0, weight.shape[0], BLOCK)


def _bind(x: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
    return lambda: ops.ordered_gemm(x, w, BLOCK)


def _seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    """Median of some calls after one that compiles; of calls that wait for their result."""
    call()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)
