"""From the first streams that differ to the tensors to look at.

What went into that sub-layer was equal, so one of its own weights is at fault (or of the embedding
before the first). A fingerprint knows of some hundred positions, its rows, whether the difference
reached them. A weight that every position uses would reach them all; a compressor's, all from the
end of its first window on; an expert's, the positions that were routed to it and no others. So a
tensor is likely in so far as the rows that it can reach are the rows that were reached (Jaccard:
their common part, over both together). Weights that decide (gate, indexer) or are looked up
(embedding) may reach any; they are named last, or first where no other fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.config import ModelConfig
from dsv4_quant.fingerprints.script import first_choice
from dsv4_quant.model.weights import Source

Part = Literal["attn", "ffn", "head"]

_OF_PART = {
    "attn": ("attn.", "attn_norm", "hc_attn_", "e_proj", "h_proj", "enorm", "hnorm"),
    "ffn": ("ffn.", "ffn_norm", "hc_ffn_"),
    "head": ("norm.", "hc_head_", "head."),
}
"""How names go on behind ``layers.N.``, ``mtp.0.`` or, for the head, at once."""

_DECIDES = (".ffn.gate.", ".attn.indexer.", "embed.")

ALMOST = 0.95
"""Of the best score: what a likely tensor has at least."""

EVEN = 0.5
"""With a lower best score, weights that may reach any row explain more."""


@dataclass(frozen=True, slots=True)
class Row:
    """One position that was hashed on its own in a sub-layer."""

    prompt: int
    position: int
    differs: bool
    experts: tuple[int, ...] = ()
    """That this layer routed it to."""


def suspects(
    ckpt: Source, layer: int | None, part: Part, rows: Sequence[Row], hit: Sequence[int]
) -> list[str]:
    """Names of the tensors that explain the rows best, likeliest first.

    Args:
        layer: counts on through the MTP block; None for the model's own head.
        rows: what was reached and what not; empty where nothing is known.
        hit: the experts that any token of this layer went to.
    """
    scored, deciding = [], []
    for spec in _of_part(ckpt, layer, part):
        if spec.expert is not None and spec.expert not in hit:
            continue
        reach = _reach(spec, rows, ckpt.config)
        if any(decides in spec.name for decides in _DECIDES):
            if all(inside or not row.differs for inside, row in zip(reach, rows, strict=True)):
                deciding.append(spec.name)
        else:
            scored.append((_jaccard(reach, [row.differs for row in rows]), spec.name))
    best = max((score for score, _ in scored), default=0.0)
    likely = [pair for pair in scored if best and pair[0] >= ALMOST * best]
    likely.sort(key=lambda pair: -pair[0])  # of equal ones the catalogue's order stays
    names = [name for _, name in likely]
    names = [*names, *deciding] if best > EVEN else [*deciding, *names]
    return names or [name for _, name in scored]


def _reach(spec: TensorSpec, rows: Sequence[Row], config: ModelConfig) -> list[bool]:
    """Which rows a tensor has a say in."""
    if spec.expert is not None:
        return [spec.expert in row.experts for row in rows]
    begins = _begins(spec, config)
    return [row.position >= begins for row in rows]


def _jaccard(one: Sequence[bool], other: Sequence[bool]) -> float:
    both = sum(a and b for a, b in zip(one, other, strict=True))
    either = sum(a or b for a, b in zip(one, other, strict=True))
    return both / either if either else 1.0


def _begins(spec: TensorSpec, config: ModelConfig) -> int:
    """The first position of a prompt that a tensor has a say in."""
    if ".indexer." in spec.name:
        return first_choice(config)
    if ".compressor." in spec.name:
        assert spec.layer is not None
        return config.compress_ratios[spec.layer] - 1
    return 0


def _of_part(ckpt: Source, layer: int | None, part: Part) -> Iterator[TensorSpec]:
    """The tensors that take part in a sub-layer, in the catalogue's order."""
    block = -1 if layer is None else layer - ckpt.config.num_hidden_layers
    prefix = "" if layer is None else f"mtp.{block}." if block >= 0 else f"layers.{layer}."
    starts = tuple(prefix + start for start in _OF_PART[part])
    if part == "head":
        starts += ("head.",)  # the MTP block has none of its own
    elif part == "attn" and (layer == 0 or block >= 0):
        starts += ("embed.",)
    return (spec for spec in ckpt.specs.values() if spec.name.startswith(starts))
