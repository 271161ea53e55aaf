"""What a forward pass shows of some of a script's prompts, and several of these put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.fingerprints.script import Script
from dsv4_quant.fingerprints.sketch import ROW_BYTES, Digest
from dsv4_quant.fingerprints.watcher import Routes, SubLayer
from dsv4_quant.model.reading import Reading, side_by_side

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Part:
    """Everything up to ``routes`` is by prompt, in the order of ``prompts``."""

    prompts: tuple[int, ...]
    """Their numbers in the script."""
    logits: tuple[Digest, ...]
    mtp_logits: tuple[Digest, ...]
    kept: tuple[Floats, ...]
    """Logits ``[spots, vocab_size]``."""
    streams: tuple[SubLayer, ...]
    routes: Routes
    experts_hit: tuple[tuple[int, ...], ...]
    """Per layer."""
    reading: Reading


def joined(script: Script, parts: Sequence[Part]) -> Part:
    """All prompts of the script, each from the part that has it."""
    where = {prompt: (part, place) for part in parts for place, prompt in enumerate(part.prompts)}
    held = [where[prompt] for prompt in range(len(script.prompts))]
    return Part(
        prompts=tuple(range(len(script.prompts))),
        logits=tuple(part.logits[place] for part, place in held),
        mtp_logits=tuple(part.mtp_logits[place] for part, place in held if part.mtp_logits),
        kept=tuple(part.kept[place] for part, place in held),
        streams=tuple(_sub_layer(script, number, held) for number in range(len(parts[0].streams))),
        routes={
            layer: [part.routes[layer][place] for part, place in held] for layer in parts[0].routes
        },
        experts_hit=tuple(
            tuple(sorted(set().union(*hit)))
            for hit in zip(*(part.experts_hit for part in parts), strict=True)
        ),
        reading=side_by_side([part.reading for part in parts]),
    )


def _sub_layer(script: Script, number: int, held: list[tuple[Part, int]]) -> SubLayer:
    """The streams after one sub-layer, of all prompts."""
    rows = b""
    for prompt, (part, place) in enumerate(held):
        before = sum(len(script.rows[other]) for other in part.prompts[:place])
        start, stop = before * ROW_BYTES, (before + len(script.rows[prompt])) * ROW_BYTES
        rows += part.streams[number].rows[start:stop]
    first = held[0][0].streams[number]
    return SubLayer(
        first.layer,
        first.part,
        tuple(part.streams[number].prompts[place] for part, place in held),
        rows,
    )
