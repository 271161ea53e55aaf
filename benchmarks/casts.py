"""The CPU casts against plain PyTorch, GB/s of output on 1 and 2 threads, in one run.

    python -m benchmarks.casts [--json FILE]        (or python benchmarks/casts.py)

One expert matrix of V4-Flash. The casts go through it as a conversion does, in panels of rows into
one buffer per thread, the exact ones with all checks for exactness, those that round with all the
figures of what it cost; PyTorch takes the whole tensor at once, checks and counts nothing. Each
figure is the best of several passes over the tensor. ``compile`` is the first call with an empty
cache; later processes load what it compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROWS, COLS, BLOCK, GROUP = 2048, 4096, (128, 128), 32
THREADS = (1, 2)


@dataclass(frozen=True)
class Case:
    """A cast of the whole matrix: ``numba(first, last)`` does some rows, ``torch()`` everything."""

    name: str
    bytes_out: int
    panel_rows: int
    numba: Callable[[int, int], int]
    torch: Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """GB/s of output per number of threads."""

    cast: str
    compile_seconds: float
    numba: list[float]
    torch: list[float]


def main() -> None:
    """Measures, prints a Markdown table, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.timing import machine

    with tempfile.TemporaryDirectory() as cache:
        os.environ["NUMBA_CACHE_DIR"] = cache  # read when numba is imported
        rows = [measure(case) for case in cases()]
    print("| cast, GB/s of output (1 / 2 threads) | numba | plain torch | ratio | compile |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        ratio = [n / t for n, t in zip(row.numba, row.torch, strict=True)]
        print(
            f"| {row.cast} | {row.numba[0]:.1f} / {row.numba[1]:.1f} "
            f"| {row.torch[0]:.2f} / {row.torch[1]:.2f} "
            f"| {ratio[0]:.0f}x / {ratio[1]:.0f}x | {row.compile_seconds:.1f} s |"
        )
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    if options.json:
        result = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(case: Case) -> Row:
    """One row of the table. Raises AssertionError if a cast reports anything."""
    import torch

    began = time.perf_counter()
    assert case.numba(0, case.panel_rows) == 0
    compile_seconds = time.perf_counter() - began
    numba_rates, torch_rates = [], []
    for threads in THREADS:
        with ThreadPoolExecutor(threads) as pool:  # one pool, so that the buffers stay
            seconds = best(partial(in_panels, case, pool, threads), 30)
        numba_rates.append(case.bytes_out / 1e9 / seconds)
        torch.set_num_threads(threads)
        torch_rates.append(case.bytes_out / 1e9 / best(case.torch, 3))
    return Row(case.name, compile_seconds, numba_rates, torch_rates)


def in_panels(case: Case, pool: ThreadPoolExecutor, threads: int) -> None:
    """The whole matrix, its panels dealt out to the threads in turn."""
    panels = [(row, row + case.panel_rows) for row in range(0, ROWS, case.panel_rows)]

    def share(first: int) -> None:
        for panel in panels[first::threads]:
            assert case.numba(*panel) == 0

    list(pool.map(share, range(threads)))


def best(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest round."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def cases() -> list[Case]:
    """The casts with their operands; buffers are per thread, as in a conversion."""
    import threading

    from dsv4_quant.formats import e2m1, e4m3, e8m0
    from dsv4_quant.kernels.bf16_to_fp4_numba import bf16_to_fp4_exact
    from dsv4_quant.kernels.bf16_to_fp8_numba import bf16_to_fp8_exact
    from dsv4_quant.kernels.canonical_numba import canonical_bf16
    from dsv4_quant.kernels.fp4_to_bf16_numba import fp4_to_bf16
    from dsv4_quant.kernels.fp4_to_fp8_numba import fp4_to_fp8, fp8_scales
    from dsv4_quant.kernels.fp8_to_bf16_numba import fp8_to_bf16
    from dsv4_quant.kernels.fp8_to_f32_numba import fp8_to_f32

    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (ROWS, COLS // 2), np.uint8)
    fp4_scale = rng.integers(115, 119, (ROWS, COLS // GROUP)).astype(np.uint8)
    fp8 = rng.integers(0, 256, (ROWS, COLS), np.uint8)
    fp8[np.isin(fp8, e4m3.NAN_CODES)] = 0
    fp8_scale = rng.integers(110, 120, (ROWS // BLOCK[0], COLS // BLOCK[1])).astype(np.uint8)
    from_fp4 = e2m1.VALUES[e2m1.unpack(packed)] * e8m0.VALUES[fp4_scale].repeat(GROUP, 1)
    fp4_bits = (from_fp4.view(np.uint32) >> 16).astype(np.uint16)
    grid = e8m0.VALUES[fp8_scale].repeat(BLOCK[0], 0).repeat(BLOCK[1], 1)
    fp8_bits = ((e4m3.VALUES[fp8] * grid).view(np.uint32) >> 16).astype(np.uint16)
    local = threading.local()

    def buffer(shape: tuple[int, int], dtype: type) -> np.ndarray[Any, Any]:
        kept = vars(local).setdefault("buffers", {})
        if (shape, dtype) not in kept:
            kept[shape, dtype] = np.zeros(shape, dtype)
        found: np.ndarray[Any, Any] = kept[shape, dtype]
        return found

    def fp4_fp8(first: int, last: int) -> int:
        scales = buffer((-(-(last - first) // BLOCK[0]), COLS // BLOCK[1]), np.uint8)
        fp8_scales(fp4_scale[first:last], GROUP, *BLOCK, scales)
        return fp4_to_fp8(
            packed[first:last], fp4_scale[first:last], scales, GROUP, *BLOCK,
            buffer((last - first, COLS), np.uint8), buffer((1, 256), np.int64)[0],
            buffer((1, 5), np.int64)[0],
        )  # fmt: skip

    def fp4_bf16(first: int, last: int) -> int:
        out = buffer((last - first, COLS), np.uint16)
        return fp4_to_bf16(packed[first:last], fp4_scale[first:last], GROUP, out)

    def fp8_bf16(first: int, last: int) -> int:
        out = buffer((last - first, COLS), np.uint16)
        return fp8_to_bf16(fp8[first:last], fp8_scale, first, *BLOCK, out)

    def fp8_f32(first: int, last: int) -> int:
        out = buffer((last - first, COLS), np.float32)
        return fp8_to_f32(fp8[first:last], fp8_scale, first, *BLOCK, out)

    def bf16_fp4(first: int, last: int) -> int:
        scales = buffer((last - first, COLS // GROUP), np.uint8)
        out = buffer((last - first, COLS // 2), np.uint8)
        fault = buffer((1, 3), np.int64)[0]
        return bf16_to_fp4_exact(fp4_bits[first:last], GROUP, scales, out, fault)

    def bf16_fp8(first: int, last: int) -> int:
        scales = buffer((-(-(last - first) // BLOCK[0]), COLS // BLOCK[1]), np.uint8)
        out, fault = buffer((last - first, COLS), np.uint8), buffer((1, 3), np.int64)[0]
        return bf16_to_fp8_exact(fp8_bits[first:last], *BLOCK, scales, out, fault)

    def canonical(first: int, last: int) -> int:
        return canonical_bf16(fp8_bits[first:last], buffer((last - first, COLS), np.uint16))

    plain = PlainTorch(packed, fp4_scale, fp8, fp8_scale, fp4_bits, fp8_bits)
    size = ROWS * COLS
    return [
        Case("FP4 -> FP8 128x128", size, 256, fp4_fp8, plain.fp4_to_fp8),
        Case("FP4 -> BF16", 2 * size, 128, fp4_bf16, plain.fp4_to_bf16),
        Case("FP8 -> BF16", 2 * size, 128, fp8_bf16, plain.fp8_to_bf16),
        Case("FP8 -> F32", 4 * size, 128, fp8_f32, plain.fp8_to_f32),
        Case("BF16 -> FP4 1x32, exact", size // 2, 128, bf16_fp4, plain.bf16_to_fp4),
        Case("BF16 -> FP8 128x128, exact", size, 128, bf16_fp8, plain.bf16_to_fp8),
        Case("BF16, -0 to +0", 2 * size, 128, canonical, plain.canonical_bf16),
        *lossy_cases(buffer),
    ]


def lossy_cases(buffer: Callable[[tuple[int, int], type], np.ndarray[Any, Any]]) -> list[Case]:
    """The casts that round, of normally distributed weights."""
    from dsv4_quant.formats.rules import ScaleRule
    from dsv4_quant.kernels.figures import Figures
    from dsv4_quant.kernels.quantise_fp4_numba import quantise_fp4
    from dsv4_quant.kernels.quantise_fp8_numba import quantise_fp8
    from dsv4_quant.kernels.round_bf16_numba import round_bf16

    weights = np.random.default_rng(1).standard_normal((ROWS, COLS), np.float32) / 50
    bits = (weights.view(np.uint32) >> 16).astype(np.uint16)

    def bf16_fp4(rule: ScaleRule, first: int, last: int) -> int:
        scales = buffer((last - first, COLS // GROUP), np.uint8)
        out, fault = buffer((last - first, COLS // 2), np.uint8), buffer((1, 3), np.int64)[0]
        figures = Figures.empty(last - first)
        return quantise_fp4(bits[first:last], rule, GROUP, scales, out, figures, fault)

    def bf16_fp8(rule: ScaleRule, first: int, last: int) -> int:
        scales = buffer((-(-(last - first) // BLOCK[0]), COLS // BLOCK[1]), np.uint8)
        out, fault = buffer((last - first, COLS), np.uint8), buffer((1, 3), np.int64)[0]
        figures = Figures.empty(len(scales))
        return quantise_fp8(bits[first:last], rule, *BLOCK, scales, out, figures, fault)

    def f32_bf16(first: int, last: int) -> int:
        out, fault = buffer((last - first, COLS), np.uint16), buffer((1, 3), np.int64)[0]
        return round_bf16(weights[first:last], out, Figures.empty(last - first), fault)

    plain = PlainLossy(weights, bits)
    size = ROWS * COLS
    cases = []
    for rule in ScaleRule:
        fp4, fp8 = partial(bf16_fp4, rule), partial(bf16_fp8, rule)
        tries = 1 if rule is ScaleRule.MAX else 2
        cases += [
            Case(f"BF16 -> FP4 1x32, {rule.value}", size // 2, 128, fp4, partial(plain.fp4, tries)),
            Case(f"BF16 -> FP8 128x128, {rule.value}", size, 128, fp8, partial(plain.fp8, tries)),
        ]
    return [*cases, Case("F32 -> BF16", 2 * size, 128, f32_bf16, plain.bf16)]


class PlainLossy:
    """The casts that round as one writes them in PyTorch; one scale, or the better of two."""

    def __init__(self, weights: Any, bits: Any) -> None:
        import torch

        from dsv4_quant.formats import e2m1

        self.weights, self.bits = torch.from_numpy(weights), torch.from_numpy(bits)
        self.table = torch.from_numpy(e2m1.VALUES)

    def fp4(self, tries: int) -> Any:
        import torch

        groups = self.bits.view(torch.bfloat16).float().unflatten(-1, (-1, GROUP))
        midpoints = (self.table[1:8] + self.table[:7]) / 2

        def code(scale: Any) -> tuple[Any, Any]:
            codes = torch.bucketize((groups / scale).abs(), midpoints) + 8 * (groups < 0)
            return codes, (self.table[codes] * scale - groups).square().sum(-1, keepdim=True)

        codes, scale = self._best(groups, code, 6, -1, tries)
        codes = codes.flatten(1).to(torch.uint8)
        return codes[:, 0::2] | (codes[:, 1::2] << 4), scale.to(torch.float8_e8m0fnu)

    def fp8(self, tries: int) -> Any:
        import torch

        tiles = self.bits.view(torch.bfloat16).float()
        tiles = tiles.view(-1, BLOCK[0], COLS // BLOCK[1], BLOCK[1])

        def code(scale: Any) -> tuple[Any, Any]:
            codes = (tiles / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            return codes, (codes.float() * scale - tiles).square().sum((1, 3), keepdim=True)

        codes, scale = self._best(tiles, code, 448, (1, 3), tries)
        return codes.view(ROWS, COLS), scale.to(torch.float8_e8m0fnu)

    def bf16(self) -> Any:
        return self.weights.bfloat16()

    @staticmethod
    def _best(blocks: Any, code: Any, top: float, dims: Any, tries: int) -> tuple[Any, Any]:
        import torch

        amax = blocks.abs().amax(dims, keepdim=True).clamp_min(1e-30)
        scale = torch.exp2(torch.ceil(torch.log2(amax / top)))
        codes, error = code(scale)
        if tries == 1:
            return codes, scale
        other, other_error = code(scale / 2)
        better = other_error < error
        kept = torch.where(better, other.view(codes.dtype).float(), codes.float()).to(codes.dtype)
        return kept, torch.where(better, scale / 2, scale)


class PlainTorch:
    """The same casts as one writes them in PyTorch, on whole tensors; the first as published."""

    def __init__(self, packed: Any, fp4_scale: Any, fp8: Any, fp8_scale: Any, *bits: Any) -> None:
        import torch

        from dsv4_quant.formats import e2m1

        self.packed, self.fp8 = torch.from_numpy(packed), torch.from_numpy(fp8)
        self.fp4_scale = torch.from_numpy(fp4_scale).view(torch.float8_e8m0fnu)
        self.fp8_scale = torch.from_numpy(fp8_scale).view(torch.float8_e8m0fnu)
        self.fp4_bits, self.fp8_bits = (torch.from_numpy(b).view(torch.bfloat16) for b in bits)
        self.table = torch.from_numpy(e2m1.VALUES)

    def fp4_values(self) -> Any:
        """``[R, G, 32]`` float32."""
        import torch

        even, odd = self.table[(self.packed & 15).long()], self.table[(self.packed >> 4).long()]
        return torch.stack([even, odd], -1).flatten(-2).unflatten(-1, (-1, GROUP))

    def fp4_to_fp8(self) -> Any:
        import torch

        tiles = ROWS // BLOCK[0], BLOCK[0], COLS // BLOCK[1], BLOCK[1] // GROUP
        scale = self.fp4_scale.float().view(tiles)
        largest = scale.amax((1, 3), keepdim=True) / 2**6
        values = self.fp4_values() * (scale / largest).view(ROWS, -1, 1)
        return values.flatten(1).to(torch.float8_e4m3fn), largest.to(torch.float8_e8m0fnu)

    def fp4_to_bf16(self) -> Any:
        return (self.fp4_values() * self.fp4_scale.float()[..., None]).flatten(1).bfloat16()

    def fp8_to_f32(self) -> Any:
        import torch

        tiles = self.fp8.view(torch.float8_e4m3fn).view(-1, BLOCK[0], COLS // BLOCK[1], BLOCK[1])
        return (tiles.float() * self.fp8_scale.float()[:, None, :, None]).view(ROWS, COLS)

    def fp8_to_bf16(self) -> Any:
        return self.fp8_to_f32().bfloat16()

    def bf16_to_fp4(self) -> Any:
        import torch

        groups = self.fp4_bits.float().unflatten(-1, (-1, GROUP))
        amax = groups.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0**-126)
        scale = torch.exp2(torch.ceil(torch.log2(amax / 6)))
        midpoints = (self.table[1:8] + self.table[:7]) / 2
        codes = torch.bucketize((groups / scale).abs(), midpoints) + 8 * (groups < 0)
        codes = codes.flatten(1).to(torch.uint8)
        return codes[:, 0::2] | (codes[:, 1::2] << 4), scale.to(torch.float8_e8m0fnu)

    def bf16_to_fp8(self) -> Any:
        import torch

        tiles = self.fp8_bits.float().view(-1, BLOCK[0], COLS // BLOCK[1], BLOCK[1])
        amax = tiles.abs().amax((1, 3), keepdim=True).clamp_min(1e-4)
        scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
        codes = (tiles / scale).to(torch.float8_e4m3fn).view(ROWS, COLS)
        return codes, scale.to(torch.float8_e8m0fnu)

    def canonical_bf16(self) -> Any:
        return self.fp8_bits.where(self.fp8_bits != 0, 0)


if __name__ == "__main__":
    main()
