"""The file of a fingerprint: JSON of a few kB to 256 kB, one line per spot and per sub-layer.

    format, version, tool     what it is
    kind                      "forward": a pass of our own; "served": what a served model said
    pass                      arithmetic, activations, whether the MTP block took part
    prompts                   per prompt: tokens; spots: position, ids, logits, lse (``Spot``);
                              rows: positions that are hashed one by one; logits, mtp_logits
  and of a forward pass:
    machine                   the class of machine that made it (``machine``)
    model, formats            the config's fields, and how the weights were stored
    value_digest              of the weights, or null
    coverage                  what the prompts exercise (``coverage``)
    tables                    digests of weights that a pass may use without showing (``tables``)
    experts_hit               per layer a hexadecimal number: bit e is set if expert e was used
    streams                   per sub-layer: layer, part, a digest per prompt, and in base64 the
                              first two bytes of every row's BLAKE3

A digest is a list: hash, norm, sketch sums (``sketch``). Its hash is BLAKE3 of float32 values.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UsageError
from dsv4_quant.fingerprints.document import TOP, Fingerprint
from dsv4_quant.fingerprints.script import Script
from dsv4_quant.fingerprints.sketch import BUCKETS, ROW_BYTES, Digest
from dsv4_quant.fingerprints.watcher import SubLayer

FORMAT, VERSION = "dsv4-fingerprint", 1
MAX_BYTES = 256 << 10


def to_json(fingerprint: Fingerprint) -> bytes:
    """The file's bytes. Raises UsageError if there are more than 256 kB of them."""
    script, measured = fingerprint.script, fingerprint.measured
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "tool": fingerprint.tool,
        "kind": "served" if measured is None else "forward",
        "pass": {
            "arithmetic": script.arithmetic,
            "activations": script.activations,
            "mtp": script.mtp,
        },
    }
    if measured is None:
        head["source"] = fingerprint.source
    else:
        head |= {
            "machine": asdict(measured.machine),
            "model": dict(measured.model),
            "formats": dict(measured.formats),
            "value_digest": measured.value_digest,
            "coverage": asdict(measured.coverage),
            "tables": dict(measured.tables),
            "experts_hit": [_mask(experts) for experts in measured.experts_hit],
        }
    text = "{\n" + ",\n".join(f' "{key}": {json.dumps(value)}' for key, value in head.items())
    text += ',\n "prompts": [' + ",".join(_prompts(fingerprint)) + "\n ]"
    if measured is not None:
        text += ',\n "streams": [' + _lines(map(_sub_layer, measured.streams)) + "\n ]"
    data = (text + "\n}\n").encode()
    if len(data) > MAX_BYTES:
        raise _too_large(len(data))
    return data


def check_size(config: ModelConfig, script: Script) -> None:
    """Raises UsageError before the pass if its fingerprint would not fit; errs on that side."""
    number = 16  # characters of a float and its comma
    token = len(str(config.vocab_size)) + 2
    digest = 40 + (1 + BUCKETS) * number
    spots, rows = (sum(map(len, places)) for places in (script.spots, script.rows))
    blocks = config.num_hidden_layers + script.mtp
    sub_layer = 60 + len(script.prompts) * digest + rows * ROW_BYTES * 4 // 3
    size = 6000 + sum(script.lengths) * token + rows * 6 + 4 * len(config.compress_ratios)
    size += spots * (70 + TOP * (token + number)) + 2 * len(script.prompts) * digest
    size += blocks * (2 * sub_layer + config.n_routed_experts // 4 + 80)
    if size > MAX_BYTES:
        raise _too_large(size)


def _too_large(size: int) -> UsageError:
    return UsageError(
        f"The fingerprint would have {size:,} bytes, more than {MAX_BYTES:,}",
        hint="Give fewer or shorter prompts.",
    )


def _prompts(fingerprint: Fingerprint) -> Iterable[str]:
    script, measured = fingerprint.script, fingerprint.measured
    for i, tokens in enumerate(script.prompts):
        parts: dict[str, Any] = {"tokens": tokens}
        if measured is not None:
            parts |= {"rows": script.rows[i], "logits": _digest(measured.logits[i])}
            if measured.mtp_logits:
                parts["mtp_logits"] = _digest(measured.mtp_logits[i])
        pairs = zip(script.spots[i], fingerprint.spots[i], strict=True)
        spots = _lines({"position": position, **asdict(spot)} for position, spot in pairs)
        yield f'\n  {_compact(parts)[:-1]},"spots":[{spots}]}}'


def _mask(experts: Iterable[int]) -> str:
    return f"{sum(1 << expert for expert in experts):x}"


def _digest(digest: Digest) -> list[Any]:
    return [digest.hash, digest.norm, *digest.sketch]


def _sub_layer(seen: SubLayer) -> dict[str, Any]:
    return {
        "layer": seen.layer,
        "part": seen.part,
        "prompts": [_digest(one) for one in seen.prompts],
        "rows": base64.b64encode(seen.rows).decode(),
    }


def _lines(entries: Iterable[Any]) -> str:
    return ",".join(f"\n  {_compact(entry)}" for entry in entries)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
