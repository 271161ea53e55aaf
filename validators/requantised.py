"""The manifest's section on rounding, against the manifest's own records and the catalogue."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from math import prod

from dsv4_quant.catalogue import Catalogue, TensorSpec
from dsv4_quant.checkpoint.manifest import MANIFEST, Manifest
from dsv4_quant.checkpoint.requantised import Requantised, by_layer
from dsv4_quant.formats.cost import Cost
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.strict_json import shown
from dsv4_quant.validators.report import Finding, error

COUNTS = ("values", "saturated", "flushed", "blocks", "exact_blocks")
SUMS = ("value_squares", "error_squares")

SUMS_AGREE = 1e-12
"""Relative: sums over the same weights."""

MOST = 2.0**129
"""Two values of float32 are no farther apart."""


def judge_requantised(manifest: Manifest, catalogue: Catalogue | None) -> Iterator[Finding]:
    """Every contradiction. Without a catalogue, only those between sources and costs."""
    section = manifest.requantised
    costs = {} if section is None else section.tensors
    yield from _judge_sources(manifest, costs)
    if section is None:
        return
    rules = [rule.value for rule in ScaleRule]
    if section.rule not in rules:
        yield _wrong(f"requantised.rule {section.rule[:60]!r}", "No rule of this tool.",
                     expected=" or ".join(rules))  # fmt: skip
    if catalogue is None:
        return
    wrong = list(_judge_tensors(costs, catalogue.specs))
    yield from wrong
    if not wrong:  # else there is nothing to add up
        yield from _judge_layers(section, catalogue.specs.values())


def stated_sqnr(manifest: Manifest) -> float | None:
    """The model's, in dB; None where nothing was rounded, or the figures cannot be added up."""
    try:
        sqnr = manifest.requantised.model.sqnr if manifest.requantised is not None else math.inf
    except (ValueError, OverflowError):  # figures that _judge_tensors refuses
        return None
    return sqnr if math.isfinite(sqnr) else None


def _wrong(found: str, meaning: str, *, expected: str, tensor: str | None = None) -> Finding:
    return error("manifest", found, meaning, file=MANIFEST, tensor=tensor, expected=expected)


def _judge_sources(manifest: Manifest, costs: Mapping[str, Cost]) -> Iterator[Finding]:
    """A weight has a source of other values if, and only if, rounding it had an error.

    -0 that became +0 is neither: both have the same digest, and there is no error.
    """
    for name, record in manifest.tensors.items():
        cost = costs.get(name, Cost())
        if record.source is None and cost.error_squares != 0:
            yield _wrong(f"error_squares {cost.error_squares:.6g}",
                         "Values changed, so the record must say of which they were made.",
                         expected="0, or a source", tensor=name)  # fmt: skip
        if record.source is not None and cost.error_squares == 0:
            says = "error_squares 0" if name in costs else "nothing"
            yield _wrong(f"a source, and in requantised {says}",
                         "What rounding the weight cost is not stated.",
                         expected="error_squares above 0", tensor=name)  # fmt: skip
        if record.source == record.digest:
            yield _wrong(f"source {record.source}", "The record names its own values as those that"
                         " were changed.", expected="another digest", tensor=name)  # fmt: skip


def _judge_tensors(costs: Mapping[str, Cost], specs: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    for name, cost in costs.items():
        if name not in specs:
            yield _wrong("a cost", "The model has no such weight.", expected="no such name",
                         tensor=name)  # fmt: skip
            continue
        for found, expected in _impossible(cost, specs[name]):
            yield _wrong(found, "No rounding of this weight costs that.", expected=expected,
                         tensor=name)  # fmt: skip


def _impossible(cost: Cost, spec: TensorSpec) -> Iterator[tuple[str, str]]:
    """(what is stated, what could be) of figures that contradict the weight or each other."""
    values = prod(spec.matrix)
    blocks = prod(spec.format.scale_shape(spec.matrix)) if spec.format.is_quantised else (
        spec.matrix[0]
    )  # fmt: skip
    limits = {
        "values": (values, values),
        "value_squares": (0, values * MOST * MOST),
        "error_squares": (0, values * MOST * MOST),
        "largest_error": (0, MOST),
        "saturated": (0, values),
        "flushed": (0, values),
        "blocks": (blocks, blocks),
        "exact_blocks": (0, blocks),
    }
    is_sound = True
    for key, (least, most) in limits.items():
        if not least <= getattr(cost, key) <= most:
            is_sound = False
            yield (
                f"{key} {shown(getattr(cost, key))}",
                f"{least} to {most}" if least < most else f"{most}",
            )
    square = cost.largest_error * cost.largest_error
    slack = 1 + SUMS_AGREE
    if is_sound and not square <= cost.error_squares * slack <= values * square * slack * slack:
        yield (
            f"error_squares {cost.error_squares:.6g} with largest_error {cost.largest_error:.6g}",
            f"{square:.6g} to {values * square:.6g}",
        )
    if is_sound and (cost.exact_blocks == blocks) != (cost.error_squares == 0):
        yield (
            f"exact_blocks {cost.exact_blocks:,} with error_squares {cost.error_squares:.6g}",
            f"{blocks:,} only where error_squares is 0",
        )


def _judge_layers(section: Requantised, specs: Iterable[TensorSpec]) -> Iterator[Finding]:
    """Each layer states what its weights add up to."""
    held = list(specs)
    added = by_layer(held, section.tensors)
    scaled = [spec for spec in held if spec.format.is_quantised]
    blocks = {layer: cost.blocks for layer, cost in by_layer(scaled, section.tensors).items()}
    for layer in added.keys() | section.layers.keys():
        name = f"layer {layer[:60]}" if layer else "what belongs to no layer"
        if (layer in added) != (layer in section.layers):
            says, must = "nothing", "its cost"
            if layer in section.layers:
                says, must = must, says
            yield _wrong(f"requantised.layers says of {name} {says}",
                         "Layers and weights do not agree.", expected=must)  # fmt: skip
            continue
        for key, said, is_ in _unequal(section.layers[layer], added[layer], blocks.get(layer, 0)):
            yield _wrong(f"{name} {key} {shown(said)}", "Its weights add up to something else.",
                         expected=f"{key} {shown(is_)}")  # fmt: skip


def _unequal(said: Cost, added: Cost, blocks: int) -> Iterator[tuple[str, object, object]]:
    """(figure, stated, added up); only layers know exponents, one for each block with a scale."""
    for key in (*COUNTS, *SUMS, "largest_error"):
        one, other = getattr(said, key), getattr(added, key)
        agree = math.isclose(one, other, rel_tol=SUMS_AGREE) if key in SUMS else one == other
        if not agree:
            yield key, one, other
    exponents = sum(said.exponents.values())
    if exponents != blocks:
        yield "exponents of so many blocks:", exponents, blocks
