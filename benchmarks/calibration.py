"""What calibration saves: output error and KL against plain rounding, on prompts it has not seen.

    python -m benchmarks.calibration [--tokens N] [--json FILE]

A small synthetic model (random weights, see ``synthesis``) gets embeddings with structure, because
all depends on how the inputs of the experts are correlated:

    white      as synthesised: every direction is as large. Nothing can be gained.
    decaying   the i-th principal direction has variance 1 / i, as hidden states of language models
               roughly have; directions are random.
    outliers   the same, and 3 % of the channels are ten times larger (by ``ffn_norm.weight``).

Its experts are rounded from BF16 (or from -Base's FP8) by the largest value, by least squares, and
calibrated: with the shrinkage that is estimated (``second_order_factor_numba``), and with the 1 %
that GPTQ fixes. Prompts are random; those that measure hold no token of those that calibrate.

    output error   sum of |X (W - Q)'|**2 / sum of |X W'|**2 over all experts' matrices
    KL             KL(original || rounded) of the logits: mean over the positions, and median. A few
                   tokens that go to other experts than before make up most of a small mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.timing import machine
from dsv4_quant.calibration import Calibration, collect
from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.config import ModelConfig
from dsv4_quant.conversion.calibrated import second_order
from dsv4_quant.formats import bf16
from dsv4_quant.formats.blocks import BF16, FP4, Format, Tensor, fp8
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.ops import quantise_fp4, quantise_fp8
from dsv4_quant.kernels.second_order_check_numba import wins
from dsv4_quant.kernels.second_order_factor_numba import Factor, factor
from dsv4_quant.model import forward
from dsv4_quant.model.weights import Source
from dsv4_quant.synth_config import TINY
from dsv4_quant.synthesis import synth

Prompts = list[list[int]]

LENGTH = 64
"""Tokens of a prompt."""

MODEL = {**TINY, "vocab_size": 4096, "num_hidden_layers": 4, "num_nextn_predict_layers": 0,
         "compress_ratios": [0, 4, 128, 4]}  # fmt: skip
HELD_OUT_TOKENS = 1024
STRUCTURES = ("white", "decaying", "outliers")
OUTLIERS, OUTLIER_SIZE = 0.03, 10.0
GPTQ = 0.01


class Structured:
    """A checkpoint with some weights in the place of its own; what the model needs of one."""

    def __init__(self, ckpt: Source, changed: Mapping[str, Tensor]) -> None:
        self._ckpt, self._changed = ckpt, changed
        self.config: ModelConfig = ckpt.config
        self.specs: Mapping[str, TensorSpec] = ckpt.specs

    def read(self, name: str) -> Tensor:
        """A whole weight."""
        return self._changed[name] if name in self._changed else self._ckpt.read(name)

    def announce(self, name: str, start: int, stop: int) -> int:
        """Passed on."""
        return self._ckpt.announce(name, start, stop)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a BF16 weight."""
        if name not in self._changed:
            return self._ckpt.read_rows(name, start, stop)
        whole = self._changed[name]
        return Tensor(whole.format, (stop - start, *whole.shape[1:]), whole.codes[start:stop])

    def with_experts(self, changed: Mapping[str, Tensor]) -> Structured:
        """The same with other experts."""
        return Structured(self._ckpt, {**self._changed, **changed})

    def experts(self) -> Iterator[str]:
        """Names of the routed experts' weights."""
        return (name for name, spec in self.specs.items() if spec.expert is not None)


def structured(ckpt: Source, structure: str) -> Structured:
    """The checkpoint with embeddings, and norms, of one of the STRUCTURES."""
    if structure == "white":
        return Structured(ckpt, {})
    rng = np.random.default_rng(0)
    d = ckpt.config.hidden_size
    directions = np.linalg.qr(rng.standard_normal((d, d)))[0]
    sizes = np.arange(1, d + 1) ** -0.5
    sizes /= np.sqrt(np.square(sizes).mean())
    changed = {
        "embed.weight": rng.standard_normal((ckpt.config.vocab_size, d)) * sizes @ directions.T
    }
    if structure == "outliers":
        large = np.where(rng.random(d) < OUTLIERS, OUTLIER_SIZE, 1)
        for layer in range(ckpt.config.num_hidden_layers):
            name = f"layers.{layer}.ffn_norm.weight"
            changed[name] = ckpt.read(name).decode() * large
    return Structured(ckpt, {name: _bf16(values) for name, values in changed.items()})


def _bf16(values: NDArray[Any]) -> Tensor:
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return Tensor(BF16, values.shape, bf16.encode(bits.view(np.float32)))


def prompts(vocabulary: int, tokens: int, parity: int) -> Prompts:
    """Random prompts of even or of odd token ids."""
    ids = np.random.default_rng(parity).integers(0, vocabulary // 2, (tokens // LENGTH, LENGTH))
    return [[int(token) for token in row] for row in 2 * ids + parity]


def rounded(values: NDArray[np.float32], form: Format, rule: ScaleRule) -> Tensor:
    """Plainly."""
    x = torch.from_numpy(values)
    made = quantise_fp4(x, rule) if form.kind == "fp4" else quantise_fp8(x, rule)
    return Tensor(form, values.shape, made.codes.numpy(), made.scales.numpy())


def calibrated(
    values: NDArray[np.float32],
    plain: Tensor,
    made: Factor | None,
    held_out: NDArray[np.float32] | None,
) -> Tensor:
    """Under the scales of plain rounding; with held-out inputs, only where it wins there."""
    if made is None:
        return plain
    moved = second_order(values, plain, made)
    if held_out is None:
        return moved
    better = wins(held_out, values - plain.decode(), values - moved.decode())
    return replace(moved, codes=np.where(better[:, None], moved.codes, plain.codes))


@dataclass(frozen=True)
class Row:
    """One way to round one model."""

    experts: str
    structure: str
    tokens_per_expert: float
    method: str
    output_error: float
    worse: int
    """Matrices whose output error is larger than under least squares."""
    kl: float
    median_kl: float


class Bench:
    """One model and its held-out prompts."""

    def __init__(self, source: Structured, folder: Path) -> None:
        self.source = source
        self._vocabulary = source.config.vocab_size
        self._unseen = prompts(self._vocabulary, HELD_OUT_TOKENS, 1)
        self._folder = folder
        self._seen = self._collect("held-out", self._unseen)
        self.logits = torch.cat(forward(source, self._unseen).logits).double()
        self.values = {name: source.read(name).decode() for name in source.experts()}
        self._errors: dict[str, float] = {}

    def calibrate(self, tokens: int) -> Calibration:
        """From that many tokens, none of which the held-out prompts hold."""
        return self._collect(f"seen-{tokens}", prompts(self._vocabulary, tokens, 0))

    def _collect(self, name: str, some: Prompts) -> Calibration:
        (self._folder / name).mkdir()
        return collect(self.source, some, self._folder / name)

    def plain(self, form: Format, rule: ScaleRule) -> dict[str, Tensor]:
        """All experts."""
        return {name: rounded(values, form, rule) for name, values in self.values.items()}

    def calibrated(
        self, plain: Mapping[str, Tensor], by: Calibration, a: float | None
    ) -> dict[str, Tensor]:
        """All experts."""
        return {
            name: calibrated(
                self.values[name],
                tensor,
                by.factor(name) if a is None else factor(by.inputs(name), shrinkage=a),
                by.held_out(name) if a is None else None,
            )
            for name, tensor in plain.items()
        }

    def output_errors(self, experts: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Per weight: squared error of its output, and the output's square."""
        found = {}
        for name, tensor in experts.items():
            x, values = self._seen.inputs(name), self.values[name]
            apart = np.square(x @ (values - tensor.decode()).T, dtype=np.float64).sum()
            found[name] = float(apart), float(np.square(x @ values.T, dtype=np.float64).sum())
        return found

    def kl(self, experts: Mapping[str, Tensor]) -> tuple[float, float]:
        """Of the whole distributions, in nats: mean and median."""
        made = forward(self.source.with_experts(experts), self._unseen).logits
        p, q = self.logits.log_softmax(-1), torch.cat(made).double().log_softmax(-1)
        found = (p.exp() * (p - q)).sum(-1)  # [t]
        return float(found.mean()), float(found.median())


def measure(
    folder: Path, form: Format, held: str, structure: str, tokens: Sequence[int]
) -> Iterator[Row]:
    """All methods on one model."""
    config = folder / "config.json"
    config.write_text(json.dumps({**MODEL, "expert_dtype": "fp8" if held == "fp8" else "fp4"}))
    synth(folder / "model", config=config, experts="bf16" if held == "bf16" else None)
    with Checkpoint.open(folder / "model") as ckpt:
        bench = Bench(structured(ckpt, structure), folder)
        least = bench.plain(form, ScaleRule.LEAST_SQUARES)
        errors = bench.output_errors(least)
        label = f"{held} -> {form.kind}"

        def row(method: str, experts: Mapping[str, Tensor], per_expert: float = 0.0) -> Row:
            mine = bench.output_errors(experts)
            total = sum(e for e, _ in mine.values()) / sum(s for _, s in mine.values())
            worse = sum(mine[name][0] > errors[name][0] for name in mine)
            return Row(label, structure, per_expert, method, total, worse, *bench.kl(experts))

        yield row("max", bench.plain(form, ScaleRule.MAX))
        yield row("least squares", least)
        for count in tokens:
            by = bench.calibrate(count)
            per_expert = by.reach().median_tokens
            yield row("calibrated", bench.calibrated(least, by, None), per_expert)
            yield row("calibrated, GPTQ's 1 %", bench.calibrated(least, by, GPTQ), per_expert)


def cases() -> list[tuple[str, Format, str]]:
    """(experts as they are, what they become, structure of the inputs)."""
    tile = fp8((MODEL["quantization_config"]["weight_block_size"][0],) * 2)
    return [
        *(("bf16", FP4, structure) for structure in STRUCTURES),
        ("fp8", FP4, "decaying"),
        ("bf16", tile, "decaying"),
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A table; each figure also as a part of that of least squares."""
    lines = [
        "| experts | inputs | tokens per expert | rounding | output error | | worse | mean KL | |"
        " median KL | |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    plain: dict[tuple[str, str], Row] = {
        (row.experts, row.structure): row for row in rows if row.method == "least squares"
    }
    for row in rows:
        base = plain[row.experts, row.structure]
        seen = f"{row.tokens_per_expert:.0f}" if row.tokens_per_expert else ""
        lines.append(
            f"| {row.experts} | {row.structure} | {seen} | {row.method} | {row.output_error:.3e} |"
            f" {row.output_error / base.output_error:.2f} | {row.worse} | {row.kl:.2e} |"
            f" {row.kl / base.kl:.2f} | {row.median_kl:.2e} |"
            f" {row.median_kl / base.median_kl:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 4096], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    options = parser.parse_args()
    rows: list[Row] = []
    for held, form, structure in cases():
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(Path(folder), form, held, structure, options.tokens)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2)
        )
    print(markdown(rows))
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))


if __name__ == "__main__":
    main()
