"""Measures what the limits of ``fingerprint.gates`` stand on, and writes thresholds.json.

    python -m tests.fingerprints.measure_thresholds

numeric  One fingerprint compared under each of PyTorch's vector units (ATEN_CPU_CAPABILITY), on
         both golden checkpoints and on a synthetic model of 43 layers with 64 experts.
ties     The 43 layers again, every value of the streams moved by a random part of its size after
         every sub-layer: how many choices of experts turn, and how many positions that reaches.
lossy    The golden -Base checkpoint with its FP8 experts rounded to fewer bits, or damaged.

It takes some minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.fingerprints.compare import Comparison, compare
from dsv4_quant.fingerprints.file import to_json
from dsv4_quant.fingerprints.make import make_fingerprint
from dsv4_quant.fingerprints.parse import read_fingerprint
from dsv4_quant.fingerprints.prompts import choose_prompts
from dsv4_quant.fingerprints.record import record
from dsv4_quant.formats.blocks import F32, FP4, Tensor
from dsv4_quant.kernels.fp4_act_quant_torch import fp4_act_quant
from dsv4_quant.model import Observer, forward
from dsv4_quant.synth_config import TINY
from dsv4_quant.synthesis import synth
from tests.fingerprints.damage import Alteration, Altered
from tests.folders import golden

OUT = Path(__file__).with_name("thresholds.json")
UNITS = ("avx512", "avx2", "default")

DEEP = {
    **TINY,
    "num_hidden_layers": 43,
    "num_hash_layers": 3,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "vocab_size": 2048,
    "sliding_window": 32,
    "index_topk": 64,
    "compress_ratios": [0, 0, *([4, 128] * 21)[:41], 0],
}


def main() -> None:
    """Everything, into the file."""
    with tempfile.TemporaryDirectory() as folder:
        deep = Path(folder) / "deep"
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(DEEP))
        synth(deep, config=config)
        models = {
            "tiny-fp4": golden("tiny-fp4"), "tiny-base": golden("tiny-base"), "43 layers": deep,
        }  # fmt: skip
        numeric = [row for name, path in models.items() for row in numeric_rows(name, path)]
        ties = [tell(row) for row in tie_rows(deep)]
    lossy = [tell(row) for row in lossy_rows(golden("tiny-base"))]
    OUT.write_text(
        json.dumps(
            {"torch": torch.__version__, "numeric": numeric, "ties": ties, "lossy": lossy}, indent=1
        )
        + "\n"
    )


def numeric_rows(name: str, path: Path) -> Iterator[dict[str, Any]]:
    """The same checkpoint under every vector unit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fingerprint.json"
        for unit in UNITS:
            done = subprocess.run(
                [sys.executable, "-m", __spec__.name, str(path), str(file)],
                env={**os.environ, "ATEN_CPU_CAPABILITY": unit},
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            yield tell({"model": name, "unit": unit, **json.loads(done.stdout)})


def one_unit(path: Path, file: Path) -> dict[str, Any]:
    """Records if there is no file, and compares with it."""
    if not file.exists():
        file.write_bytes(to_json(make_fingerprint(path)))
    recorded = read_fingerprint(file)
    with Checkpoint.open(path) as ckpt:
        found = compare(recorded, record(ckpt, recorded.script))
    return {
        "bit_equal": found.is_equal,
        "logit_median": short(found.logit or 0),
        "logit_max": short(max(spot.logit or 0 for spot in found.spots)),
        "streams_typical": short(max(step.typical for step in found.steps)),
        "streams_farthest": short(max(step.farthest for step in found.steps)),
    }


class Noise(Observer):
    """Moves the streams, and keeps who went where."""

    def __init__(self, size: float) -> None:
        self.size, self.routes = size, dict[tuple[int, int], torch.Tensor]()
        self._draw = torch.Generator().manual_seed(0)

    def streams(self, layer: int, part: str, prompt: int, h: torch.Tensor) -> None:
        """Tensors are not to be changed, but for a measurement of what a change does."""
        if self.size:
            h.mul_(1 + self.size * torch.randn(h.shape, generator=self._draw))

    def routed(self, layer: int, prompt: int, experts: torch.Tensor) -> None:
        self.routes[layer, prompt] = experts.sort(-1).values.clone()


def tie_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rounding, exaggerated until near ties turn."""
    with Checkpoint.open(path) as ckpt:
        prompts = choose_prompts(ckpt)
        quiet = Noise(0)
        exact = torch.cat(forward(ckpt, prompts, observer=quiet).logits)
        for size in (1e-6, 1e-5, 1e-4):
            noise = Noise(size)
            moved = torch.cat(forward(ckpt, prompts, observer=noise).logits)
            apart = (moved - exact).abs().amax(-1)
            typical = float(apart.median())
            turned = sum(
                int((noise.routes[key] != quiet.routes[key]).any(-1).sum()) for key in quiet.routes
            )
            yield {
                "noise": size,
                "choices": sum(len(route) for route in quiet.routes.values()),
                "choices_turned": turned,
                "logit_median": short(typical),
                "logit_max": short(float(apart.max())),
                "positions_beyond_10_medians": short(float((apart > 10 * typical).float().mean())),
            }


def lossy_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The same checkpoint with altered weights, or run as servers run it."""
    recorded = make_fingerprint(path)
    with Checkpoint.open(path) as ckpt:
        script = replace(recorded.script, mtp=False)
        served = replace(script, arithmetic="deployed", activations="bfloat16")
        yield lossy_row("as deployed, in bfloat16", compare(recorded, record(ckpt, served)))
        for what, alter in alterations(ckpt):
            found = compare(recorded, record(Altered(ckpt, alter), script))
            yield lossy_row(what, found)


def lossy_row(what: str, found: Comparison) -> dict[str, Any]:
    """The figures that the lossy gate looks at."""
    top1 = None if found.top1 is None else short(found.top1)
    return {"what": what, "kl": short(found.kl or 0), "clear_spots": found.clear, "top1": top1}


def alterations(ckpt: Checkpoint) -> Iterator[tuple[str, Alteration]]:
    """From harmless to gross."""
    yield "experts FP8 -> FP4", fp4_experts
    for bits, levels in (("4", 7), ("3", 3), ("2", 1)):
        yield f"experts FP8 -> {bits} bit integers", grid_experts(levels)
    yield "scales of one layer's experts doubled", scaled("layers.2.ffn.experts.", 2)
    yield "scales of all experts doubled", scaled("ffn.experts.", 2)
    yield "scales of all experts halved", scaled("ffn.experts.", 0.5)
    yield "experts of one layer off by one", shifted(ckpt, "layers.2.")
    yield "experts of all layers off by one", shifted(ckpt, "layers.")
    yield "w1 and w3 swapped", swapped(ckpt)
    yield "shared expert of one layer missing", scaled("layers.2.ffn.shared_experts.w2", 0)


def fp4_experts(name: str, held: Tensor) -> Tensor:
    """Round to nearest, a power-of-two scale per 32 values."""
    if ".experts." not in name:
        return held
    codes, scales = fp4_act_quant(torch.from_numpy(held.decode()))
    return Tensor(
        FP4, held.shape, codes.view(torch.uint8).numpy(), scales.view(torch.uint8).numpy()
    )


def grid_experts(levels: int) -> Alteration:
    """Round to nearest of 2 * levels + 1 values, a float scale per 32."""

    def alter(name: str, held: Tensor) -> Tensor:
        if ".experts." not in name:
            return held
        blocks = held.decode().reshape(held.shape[0], -1, 32)
        step = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(1e-30)) / levels
        return Tensor(F32, held.shape, (np.round(blocks / step) * step).reshape(held.shape))

    return alter


def scaled(part: str, factor: float) -> Alteration:
    """Every weight whose name holds ``part``, times a factor."""

    def alter(name: str, held: Tensor) -> Tensor:
        if part not in name:
            return held
        return Tensor(F32, held.shape, held.decode() * np.float32(factor))

    return alter


def shifted(ckpt: Checkpoint, prefix: str) -> Alteration:
    """Every expert is the next one."""

    def alter(name: str, held: Tensor) -> Tensor:
        parts = name.split(".")
        if not name.startswith(prefix) or parts[3:4] != ["experts"]:
            return held
        parts[4] = str((int(parts[4]) + 1) % ckpt.config.n_routed_experts)
        return ckpt.read(".".join(parts))

    return alter


def swapped(ckpt: Checkpoint) -> Alteration:
    """The two projections into an expert, one for the other."""
    other = {"w1": "w3", "w3": "w1"}

    def alter(name: str, held: Tensor) -> Tensor:
        parts = name.split(".")
        if ".experts." not in name or parts[-2] not in other:
            return held
        return ckpt.read(".".join([*parts[:-2], other[parts[-2]], "weight"]))

    return alter


def short(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def tell(row: dict[str, Any]) -> dict[str, Any]:
    """Printed as it comes."""
    print(row, flush=True)
    return row


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(one_unit(Path(sys.argv[1]), Path(sys.argv[2]))))
    else:
        main()
