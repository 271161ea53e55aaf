"""How much of the device's copy bandwidth each Triton kernel reaches, and what whole conversions
and forward passes gain from the device.

    python -m benchmarks.kernels [--tokens 8192] [--size 4] [--folder FOLDER]

Shapes are V4-Flash's; a stack of experts is cast in one launch. Bytes are those that must move:
every operand read once, every result written once (a lossy cast's figures are results too), and for
sparse_attn the listed keys. The yardstick is a plain device copy of 1 GiB, counted
the same way (read and written). A conversion's yardstick is the disk: cp and sync of its output,
right after it. Products and passes: ``benchmarks.products``. Needs a GPU; without one it says so
and ends well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import products
from benchmarks.conversion import checkpoint
from benchmarks.timing import copy, dsv4, forget, remove, size_of
from dsv4_quant.config import FP8_BLOCK
from dsv4_quant.formats.blocks import FP4, Format, fp8
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels import ops
from dsv4_quant.kernels.defaults import FP8

HIDDEN, HEADS, HEAD_DIM, INDEX_HEADS, INDEX_DIM = 4096, 64, 512, 64, 128
EXPERT, LISTED, STREAMS, DECODED = 2048, 640, 4, 16
EXPERTS = 32

CONVERSIONS = {
    "FP4 to FP8": ("fp4", ["--experts", "fp8"]),
    "FP4 to BF16": ("fp4", ["--experts", "bf16"]),
    "BF16 to FP8, lossy": ("bf16", ["--experts", "fp8", "--lossy"]),
    "BF16 to FP4, lossy": ("bf16", ["--experts", "fp4", "--lossy"]),
}
"""What the experts are before, and the options; one file per GPU for 8 GPUs."""


def main() -> None:
    """Measure and print one line per kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--tokens", type=int, default=8192, help="rows of activations")
    parser.add_argument("--size", type=float, default=4, help="GB of the FP4 checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="of every conversion")
    parser.add_argument("--folder", type=Path, help="where to convert; needs 15 times the size")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("the kernels' benchmark needs a GPU and finds none: nothing was measured")
        return
    yardstick = _copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {yardstick / 1e9:.0f} GB/s")
    print(f"{'kernel':40} {'ms':>9} {'GB/s':>8} {'of copy':>8}")
    for name, call, moved in (*_weight_casts(), *_cases(options.tokens)):
        seconds = _seconds(call)
        rate = moved / seconds
        print(f"{name:40} {seconds * 1e3:9.3f} {rate / 1e9:8.0f} {rate / yardstick:8.0%}")
    print(products.HEAD)
    for row in products.product_rows(torch.device("cuda"), seconds=_seconds):
        print(row, flush=True)
    print(f"{'conversion, cold source':40} {'s':>9} {'GB/s out':>8} {'of cp':>8} {'s of CPU':>9}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = checkpoint(Path(folder), options.size)
        for row in _conversions(source, Path(folder), options.rounds):
            print(row, flush=True)
        print(products.PASS_HEAD)
        for row in products.pass_rows(source, Path(folder), options.rounds):
            print(row, flush=True)


def _conversions(
    fp4: Path, folder: Path, rounds: int, devices: tuple[str, ...] = ("cpu", "cuda")
) -> Iterator[str]:
    """A line for each conversion on each device: medians; the first round of a device compiles."""
    bf16 = folder / "bf16"
    dsv4("convert", str(fp4), str(bf16), "--layout", "hf", "--experts", "bf16", "--quiet")
    for name, (held, options) in CONVERSIONS.items():
        source = {"fp4": fp4, "bf16": bf16}[held]
        for device in devices:
            chosen = [*options, "--device", device]
            runs = [_conversion(source, folder, chosen) for _ in range(rounds)]
            seconds, rate, share, cpu = map(statistics.median, zip(*runs, strict=True))
            title = f"{name}, {device}"
            yield f"{title:40} {seconds:9.2f} {rate / 1e9:8.2f} {share:8.0%} {cpu:9.1f}"


def _conversion(source: Path, folder: Path, options: list[str]) -> tuple[float, ...]:
    """Seconds, bytes of output per second, that rate as a share of cp's, CPU seconds."""
    out, copied = folder / "out", folder / "copied"
    remove(out)
    forget(source)
    ours = dsv4("convert", str(source), str(out), "--gpus", "8", *options, "--quiet")
    forget(out)
    theirs = copy(out, copied)
    remove(copied)
    return ours.wall, size_of(out) / ours.wall, theirs.wall / ours.wall, ours.cpu


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines."""


def _weight_casts() -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Name, call and bytes of every cast of a stack of experts."""
    values = torch.randn(EXPERTS, EXPERT, HIDDEN, device="cuda", dtype=torch.bfloat16)
    cases: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("fp4_to_fp8", ops.fp4_to_fp8, _stack(FP4)),
        ("fp4_to_bf16", ops.fp4_to_bf16, _stack(FP4)),
        ("fp8_to_bf16, e8m0", ops.fp8_to_bf16, _stack(FP8)),
        ("fp8_to_bf16, f32", ops.fp8_to_bf16, _stack(fp8(FP8_BLOCK, "f32"))),
        *((f"quantise_fp4, {rule.value}", ops.quantise_fp4, (values, rule)) for rule in ScaleRule),
        *((f"quantise_fp8, {rule.value}", ops.quantise_fp8, (values, rule)) for rule in ScaleRule),
    ]
    for name, operation, operands in cases:
        call = _bind(operation, operands)
        yield f"{name} {EXPERTS}x{EXPERT}x{HIDDEN}", call, _bytes(operands) + _bytes(call())


def _stack(fmt: Format) -> tuple[Tensor, Tensor, Format]:
    """A stack of experts; float32 scales are random numbers, not powers of two."""
    codes, scales, _ = _weight(fmt, EXPERTS * EXPERT)
    if fmt.scale == "f32":
        scales = torch.rand(scales.shape, device="cuda")
    stack = codes.reshape(EXPERTS, EXPERT, -1), scales.reshape(EXPERTS, -1, scales.shape[-1])
    return (*stack, fmt)


def _cases(tokens: int) -> list[tuple[str, Callable[[], Any], int]]:
    """Name, call and bytes of every kernel."""
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    heads = torch.randn(tokens, INDEX_HEADS, INDEX_DIM, device="cuda", dtype=torch.bfloat16)
    mixes = torch.randn(tokens, (2 + STREAMS) * STREAMS, device="cuda")
    scale, base = torch.ones(3, device="cuda"), mixes[0].clone()
    cases: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        (f"act_quant {tokens}x{HIDDEN}", ops.act_quant, (x,)),
        (f"fp4_act_quant {tokens}x{INDEX_HEADS}x{INDEX_DIM}", ops.fp4_act_quant, (heads,)),
        (f"hadamard {tokens}x{INDEX_HEADS}x{INDEX_DIM}", ops.hadamard, (heads,)),
        (f"hc_split_sinkhorn {tokens}", ops.hc_split_sinkhorn, (mixes, scale, base, STREAMS)),
    ]
    for fmt, gemm in ((FP8, ops.fp8_gemm), (FP4, ops.fp4_gemm)):
        large = _weight(fmt, 32 * EXPERT)
        cases.append((f"block_dequant {fmt.kind} {32 * EXPERT}x{HIDDEN}", ops.block_dequant, large))
        for rows in (DECODED, tokens):
            operands = (*ops.act_quant(x[:rows]), *_weight(fmt, EXPERT))
            cases.append((f"{fmt.kind}_gemm {rows}x{HIDDEN} -> {EXPERT}", gemm, operands))
    measured = []
    for name, operation, operands in cases:
        moved = _bytes(operands) + _bytes(operation(*operands))
        measured.append((name, _bind(operation, operands), moved))
    return [*measured, _attention()]


def _attention() -> tuple[str, Callable[[], Any], int]:
    """sparse_attn at 512 positions; every position reads its own keys."""
    q = torch.randn(1, 512, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(1, 8192, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    sink = torch.zeros(HEADS, device="cuda")
    indices = torch.randint(8192, (1, 512, LISTED), device="cuda", dtype=torch.int32)
    operands = (q, kv, sink, indices, HEAD_DIM**-0.5)
    moved = 2 * q.nbytes + indices.nbytes + indices.numel() * HEAD_DIM * kv.itemsize
    return (
        f"sparse_attn 512x{HEADS}x{HEAD_DIM}, {LISTED} keys",
        _bind(ops.sparse_attn, operands),
        moved,
    )


def _weight(fmt: Format, rows: int) -> tuple[Tensor, Tensor, Format]:
    """Random codes ``[rows, HIDDEN]``, none of them NaN, and scales, with their format."""
    width = HIDDEN // (2 if fmt.kind == "fp4" else 1)
    codes = torch.randint(0, 256, (rows, width), device="cuda", dtype=torch.uint8)
    if fmt.kind == "fp8":
        codes.masked_fill_(codes & 0x7F == 0x7F, 0)
    shape = fmt.scale_shape((rows, HIDDEN))
    return codes, torch.randint(110, 120, shape, device="cuda", dtype=torch.uint8), fmt


def _bind(operation: Callable[..., Any], operands: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: operation(*operands, backend="triton")


def _bytes(values: Any) -> int:
    """Bytes of a tensor, or of the tensors among some values."""
    values = values if isinstance(values, tuple) else (values,)
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _seconds(call: Callable[[], Any]) -> float:
    """Median time of a call, caches flushed between calls."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median")) / 1e3


def _copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


if __name__ == "__main__":
    main()
