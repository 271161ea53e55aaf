"""From what was counted in a weight to what it means."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.formats import e8m0
from dsv4_quant.validators.report import Finding, error, warning
from dsv4_quant.validators.tally import Spot, Tally

HOLE = 2048
"""Zeros in a stretch that no trained weight has: half a page of FP4 codes, an eighth of a tile."""

DEAD_SHARE = 0.01
SATURATED_SHARE = 0.01
SLACK_SHARE = 0.5
"""Blocks of a weight beyond which a warning is due."""

ODD_STEPS = 16
"""Binades from a weight's median scale. Published weights spread by 3; a flipped bit of the upper
half of a scale byte moves it by 16 or more."""


def judge_weight(spec: TensorSpec, file: str, tally: Tally) -> Iterator[Finding]:
    """The findings of one weight from its counts; ``file`` holds its first row."""

    def at(spot: Spot) -> str:
        return f"{spot.count:,}, the first {spot.value} at [{spot.row}, {spot.column}]"

    if tally.bad_scales is not None:
        yield error("numbers", f"scales that are none: {at(tally.bad_scales)}",
                    "A scale is a positive finite number (0xFF is NaN): its whole block is lost.",
                    file=file, tensor=spec.scale_name)  # fmt: skip
    if tally.bad is not None:
        what = "NaN codes" if spec.format.kind == "fp8" else "NaN or infinite values"
        yield error("numbers", f"{what}: {at(tally.bad)}",
                    "One NaN in a weight makes every output NaN that it takes part in.",
                    file=file, tensor=spec.name)  # fmt: skip
    if tally.huge is not None:
        yield warning("numbers", f"values of 65,536 and more: {at(tally.huge)}",
                      "No weight of this model is as large: a flipped exponent bit?",
                      file=file, tensor=spec.name)  # fmt: skip
    yield from _judge_blocks(spec, file, tally)
    yield from _judge_scales(spec, file, tally)


def _judge_blocks(spec: TensorSpec, file: str, tally: Tally) -> Iterator[Finding]:
    blocks = tally.blocks
    if not blocks:
        if tally.zero_run >= HOLE:
            yield warning("blocks", f"{tally.zero_run:,} zeros in a row",
                          "A hole in the file, or a part of the weight that was never trained.",
                          file=file, tensor=spec.name)  # fmt: skip
        return
    if tally.zero_run >= HOLE or tally.dead > DEAD_SHARE * blocks:
        yield warning("blocks", f"dead blocks: {tally.dead:,} of {blocks:,} hold zeros only,"
                      f" {tally.zero_run:,} values in a row",
                      "A hole in the file, or a part of the weight that was never trained.",
                      file=file, tensor=spec.name)  # fmt: skip
    if tally.saturated > SATURATED_SHARE * blocks:
        yield warning("blocks", f"saturated blocks: {tally.saturated:,} of {blocks:,} have half of"
                      " their codes at the largest magnitude",
                      "Their scales are too small: large values were cut off.",
                      file=file, tensor=spec.name)  # fmt: skip
    live = blocks - tally.dead
    if tally.slack > SLACK_SHARE * live:
        yield warning("blocks", f"unused headroom: {tally.slack:,} of {blocks:,} blocks use a"
                      " quarter of the format's range at most",
                      "Their scales are too large: precision was given away.",
                      file=file, tensor=spec.name)  # fmt: skip


def _judge_scales(spec: TensorSpec, file: str, tally: Tally) -> Iterator[Finding]:
    """Scales far from the others of the same weight; those of dead blocks do not count."""
    exponents = tally.exponents.copy()
    exponents[e8m0.NAN] = 0
    total = int(exponents.sum())
    if not total:
        return
    median = int(np.searchsorted(np.cumsum(exponents), (total + 1) // 2))
    steps = np.abs(np.arange(256) - median)
    odd = np.flatnonzero((exponents > 0) & (steps > ODD_STEPS - 1))
    if odd.size:
        worst = int(odd[steps[odd].argmax()])
        yield warning("blocks", f"odd scales: {int(exponents[odd].sum()):,} of {total:,}, such as"
                      f" 2**{worst - e8m0.BIAS} where most are about 2**{median - e8m0.BIAS}",
                      "A flipped bit in a scale, or another weight's scales.",
                      file=file, tensor=spec.scale_name)  # fmt: skip


def judge_expert_ids(spec: TensorSpec, file: str, tally: Tally, experts: int) -> Iterator[Finding]:
    """The table from token to experts of a hash-routed layer."""
    if tally.bad is not None:
        spot = tally.bad
        yield error("expert ids",
                    f"{spot.count:,} out of range, the first {spot.value}"
                    f" at [{spot.row}, {spot.column}]",
                    "These tokens would be sent to an expert that does not exist.",
                    file=file, tensor=spec.name, expected=f"ids 0 to {experts - 1}")  # fmt: skip
