"""What a served model said, as a fingerprint.

A server tells the likeliest next tokens and their log-probabilities, and nothing of what is inside.
That is enough for the lossy gate. ``dsv4-quant fingerprint --import FILE`` takes this JSON::

    {
      "format": "dsv4-served",
      "version": 1,
      "source": "vLLM 0.12 of DeepSeek-V4-Flash, 2026-11-21",      (a line of text, may be left out)
      "prompts": [
        {
          "tokens": [0, 128803, 671, 6102, ...],
          "spots": [
            {"position": 17, "top": [[1437, -0.031], [270, -4.25], ...]},
            {"position": 18, "top": [16]}
          ]
        }
      ]
    }

tokens    ids of the whole text as the model saw it: the prompt with its chat template, and then
          what it answered. No text is tokenised here.
position  counted from 0: ``top`` is what the model said would follow tokens 0 to position. So the
          position of the prompt's last token is where the answer's first token is foretold.
top       the 1 to 20 likeliest ids, best first: [id, log-probability] (natural logarithm, without
          temperature), or bare ids where only the order is known.

Some interfaces answer 0 for the chosen token and -9999 for all others, if they name any. Such
log-probabilities say nothing: only the order of these ids is kept, and the first alone is judged.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsv4_quant import strict_json
from dsv4_quant.errors import UnreadableError
from dsv4_quant.fingerprints.document import TOP, Fingerprint, Spot
from dsv4_quant.fingerprints.node import Node
from dsv4_quant.fingerprints.prompts import LONGEST
from dsv4_quant.fingerprints.record import TOOL
from dsv4_quant.fingerprints.script import MAX_PROMPTS, SPOTS, Activations, Arithmetic, Script

FORMAT, VERSION = "dsv4-served", 1
MAX_BYTES = 4 << 20

PLACEHOLDER = -9999.0
"""A log-probability that some interfaces give instead of one."""

SLACK = 1e-3
"""By how much probabilities may exceed 1 together: servers round."""


def import_served(
    path: Path, *, arithmetic: Arithmetic = "exact", activations: Activations = "float32"
) -> Fingerprint:
    """Reads the JSON above. Raises UnreadableError that says where it is wrong.

    Args:
        arithmetic, activations: what a checkpoint will be run in when it is compared.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
        raw = strict_json.parse(path.read_bytes(), max_values=500_000)
        return parse_served(raw, arithmetic, activations)
    except OSError as error:
        raise UnreadableError(f"The file cannot be read: {error.strerror}", file=path) from None
    except ValueError as error:
        raise UnreadableError(
            f"This cannot be imported: {error}",
            file=path,
            hint="`dsv4-quant fingerprint --help` shows the form.",
        ) from None


def parse_served(
    raw: Any, arithmetic: Arithmetic = "exact", activations: Activations = "float32"
) -> Fingerprint:
    """The JSON object -> Fingerprint. Raises ValueError."""
    top = Node(raw)
    top.object(("format", "version", "prompts"), ("source",))
    top["format"].choice(FORMAT)
    top["version"].choice(VERSION)
    prompts, places, spots = [], [], []
    for prompt in top["prompts"].items(1, MAX_PROMPTS):
        prompt.object(("tokens", "spots"))
        tokens = prompt["tokens"].integers(0, (1 << 24) - 1, (1, LONGEST))
        said = list(prompt["spots"].items(1, SPOTS))
        for spot in said:
            spot.object(("position", "top"))
        positions = Node([spot["position"].value for spot in said], f"{prompt.where}.spots")
        prompts.append(tokens)
        places.append(positions.places(len(tokens), SPOTS))
        spots.append(tuple(_spot(spot["top"]) for spot in said))
    if sum(map(len, places)) > SPOTS:
        top["prompts"].fail(f"have more than {SPOTS} spots together")
    script = Script(tuple(prompts), tuple(places), ((),) * len(prompts), arithmetic, activations)
    source = top["source"].text(r"[^\x00-\x1f\x7f]{0,200}") if top.has("source") else None
    return Fingerprint(TOOL, script, tuple(spots), measured=None, source=source)


def _spot(top: Node) -> Spot:
    entries = list(top.items(1, TOP))
    pairs = [list(entry.items(2, 2)) for entry in entries if isinstance(entry.value, list)]
    if pairs and len(pairs) != len(entries):
        top.fail("gives log-probabilities for some ids only")
    ids = tuple(node.integer(0, (1 << 24) - 1) for node in ([p[0] for p in pairs] or entries))
    if len(set(ids)) != len(ids):
        top.fail("names a token twice")
    said = tuple(pair[1].number() for pair in pairs)
    if not said or min(said) <= PLACEHOLDER or said == (0.0,):
        return Spot(ids, ())
    if any(b > a for a, b in pairwise(said)):
        top.fail("is not sorted, likeliest first")
    if said[0] > SLACK or sum(map(math.exp, said)) > 1 + SLACK:
        top.fail("holds log-probabilities of more than 1 together; are they logits?")
    return Spot(ids, said)
