"""Reads the file of a fingerprint, which may come from anybody: every value is checked."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, cast

from dsv4_quant import strict_json
from dsv4_quant.errors import UnreadableError
from dsv4_quant.fingerprints.coverage import Coverage
from dsv4_quant.fingerprints.document import TOP, Fingerprint, Measured, Spot
from dsv4_quant.fingerprints.file import FORMAT, MAX_BYTES, VERSION
from dsv4_quant.fingerprints.machine import Machine
from dsv4_quant.fingerprints.node import Node
from dsv4_quant.fingerprints.prompts import LONGEST
from dsv4_quant.fingerprints.script import MAX_PROMPTS, ROWS, SPOTS, Script
from dsv4_quant.fingerprints.sketch import BUCKETS, ROW_BYTES, Digest
from dsv4_quant.fingerprints.watcher import SubLayer

_TOKEN = (0, (1 << 24) - 1)
_MANY = 1 << 30
_HEAD = ("format", "version", "tool", "kind", "pass", "prompts")
_MEASURED = (
    "machine", "model", "formats", "value_digest", "coverage", "tables", "experts_hit", "streams",
)  # fmt: skip
_LINE = r"[^\x00-\x1f\x7f]{0,400}"


def read_fingerprint(path: Path) -> Fingerprint:
    """Raises UnreadableError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
        return parse_fingerprint(strict_json.parse(path.read_bytes(), max_values=MAX_BYTES))
    except OSError as error:
        what = f"The fingerprint cannot be read: {error.strerror}"
        raise UnreadableError(what, file=path) from None
    except ValueError as error:
        raise UnreadableError(
            f"This is no fingerprint that this tool can read: {error}",
            file=path,
            hint="`dsv4-quant fingerprint` makes one.",
        ) from None


def parse_fingerprint(raw: Any) -> Fingerprint:
    """The JSON object -> Fingerprint. Raises ValueError that says where."""
    top = Node(raw)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        top.fail(f"does not say format {FORMAT}")
    if raw.get("version") != VERSION:
        top.fail(f"has version {strict_json.shown(raw.get('version'))}; this tool reads {VERSION}")
    is_served = raw.get("kind") == "served"
    top.object((*_HEAD, "source") if is_served else (*_HEAD, *_MEASURED))
    top["kind"].choice("served", "forward")
    script = _script(top, is_served)
    prompts = list(top["prompts"].items(1, MAX_PROMPTS))
    return Fingerprint(
        tool=top["tool"].text(_LINE),
        script=script,
        spots=tuple(
            tuple(_spot(node) for node in prompt["spots"].items(0, SPOTS)) for prompt in prompts
        ),
        measured=None if is_served else _measured(top, prompts, script),
        source=top["source"].text(_LINE) if is_served and top.has("source") else None,
    )


def _script(top: Node, is_served: bool) -> Script:
    top["pass"].object(("arithmetic", "activations", "mtp"))
    has_mtp = top["pass"]["mtp"].choice(True, False)
    keys = ["tokens", "spots"] if is_served else ["tokens", "spots", "rows", "logits"]
    keys += ["mtp_logits"] * (has_mtp and not is_served)
    tokens, spots, rows = [], [], []
    for prompt in top["prompts"].items(1, MAX_PROMPTS):
        prompt.object(keys)
        tokens.append(prompt["tokens"].integers(*_TOKEN, (1, LONGEST)))
        said = map(_is_spot, prompt["spots"].items(0, SPOTS))
        positions = [node["position"].value for node in said]
        spots.append(Node(positions, f"{prompt.where}.spots").places(len(tokens[-1]), SPOTS))
        rows.append(() if is_served else prompt["rows"].places(len(tokens[-1]), ROWS))
    if not any(spots) or sum(map(len, spots)) > SPOTS or sum(map(len, rows)) > ROWS:
        top["prompts"].fail(f"have no spots, or more than {SPOTS}, or more than {ROWS} rows")
    return Script(
        prompts=tuple(tokens),
        spots=tuple(spots),
        rows=tuple(rows),
        arithmetic=top["pass"]["arithmetic"].choice("exact", "deployed"),
        activations=top["pass"]["activations"].choice("float32", "bfloat16"),
        mtp=has_mtp,
    )


def _is_spot(node: Node) -> Node:
    node.object(("position", "ids", "logits", "lse"))
    return node


def _spot(node: Node) -> Spot:
    ids = node["ids"].integers(*_TOKEN, (1, TOP))
    if len(set(ids)) != len(ids):
        node["ids"].fail("names a token twice")
    logits = node["logits"].numbers(0, TOP)
    if len(logits) not in (0, len(ids)):
        node["logits"].fail("does not go with ids")
    return Spot(ids, logits, node["lse"].number())


def _measured(top: Node, prompts: list[Node], script: Script) -> Measured:
    machine = top["machine"]
    machine.object(("machine", "cpu", "torch", "revision"))
    for key in ("model", "formats", "tables"):
        if not isinstance(top[key].value, dict):
            top[key].fail("is not an object")
    if not top["model"].has("num_hidden_layers"):
        top["model"].fail("does not say num_hidden_layers")
    blocks = top["model"]["num_hidden_layers"].integer(1, 1024) + script.mtp
    digest = top["value_digest"].text("[0-9a-f]{64}") if top.has("value_digest") else None
    return Measured(
        machine=Machine(
            machine["machine"].text(_LINE),
            machine["cpu"].text(_LINE),
            machine["torch"].text(_LINE),
            machine["revision"].integer(1, _MANY),
        ),
        model=top["model"].value,
        formats={key: top["formats"][key].text(_LINE) for key in top["formats"].value},
        value_digest=digest,
        coverage=_coverage(top["coverage"]),
        experts_hit=tuple(
            _experts(node.text("[0-9a-f]{1,16384}"))
            for node in top["experts_hit"].items(blocks, blocks)
        ),
        tables={key: top["tables"][key].text("[0-9a-f]{32}") for key in top["tables"].value},
        logits=tuple(_digest(prompt["logits"]) for prompt in prompts),
        mtp_logits=tuple(_digest(prompt["mtp_logits"]) for prompt in prompts) if script.mtp else (),
        streams=_streams(top["streams"], script, blocks),
    )


def _streams(node: Node, script: Script, blocks: int) -> tuple[SubLayer, ...]:
    found = tuple(_sub_layer(entry, script) for entry in node.items(2 * blocks, 2 * blocks))
    expected = [(i // 2, ("attn", "ffn")[i % 2]) for i in range(len(found))]
    if [(one.layer, one.part) for one in found] != expected:
        node.fail("is not attn and ffn of layer after layer")
    return found


def _sub_layer(node: Node, script: Script) -> SubLayer:
    node.object(("layer", "part", "prompts", "rows"))
    try:
        rows = base64.b64decode(node["rows"].text("[A-Za-z0-9+/=]*"), validate=True)
    except binascii.Error:
        node["rows"].fail("is not base64")
    if len(rows) != ROW_BYTES * sum(map(len, script.rows)):
        node["rows"].fail("does not go with the prompts' rows")
    count = len(script.prompts)
    return SubLayer(
        layer=node["layer"].integer(0, 1100),
        part=node["part"].choice("attn", "ffn"),
        prompts=tuple(_digest(entry) for entry in node["prompts"].items(count, count)),
        rows=rows,
    )


def _digest(node: Node) -> Digest:
    first, *numbers = node.items(BUCKETS + 2, BUCKETS + 2)
    norm, *sketch = (entry.number() for entry in numbers)
    return Digest(first.text("[0-9a-f]{32}"), norm, tuple(sketch))


def _experts(mask: str) -> tuple[int, ...]:
    bits = int(mask, 16)
    return tuple(expert for expert in range(bits.bit_length()) if bits >> expert & 1)


def _coverage(node: Node) -> Coverage:
    fields = Coverage.__dataclass_fields__
    node.object(list(fields))
    counts = {
        key: node[key].integer(0, _MANY)
        for key in fields
        if key not in ("experts_hit", "windows", "index_topk", "missed")
    }
    windows = node["windows"]
    if not isinstance(windows.value, dict) or not all(key.isdecimal() for key in windows.value):
        windows.fail("is not an object of ratios")
    return Coverage(
        **cast(dict[str, Any], counts),
        experts_hit=node["experts_hit"].integers(0, _MANY, (1, 1100)),
        windows={int(key[:9]): windows[key].integer(0, _MANY) for key in windows.value},
        index_topk=node["index_topk"].integer(1, _MANY) if node.has("index_topk") else None,
        missed=tuple(entry.text(_LINE) for entry in node["missed"].items(0, 20)),
    )
