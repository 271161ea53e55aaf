"""The file: exact round trip, bounded size, and nothing but clear refusals for what is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_quant.config import read_config
from dsv4_quant.errors import UnreadableError, UsageError
from dsv4_quant.fingerprints.coverage import coverage
from dsv4_quant.fingerprints.document import TOP, Fingerprint, Measured, Spot, describe_model
from dsv4_quant.fingerprints.file import MAX_BYTES, check_size, to_json
from dsv4_quant.fingerprints.machine import Machine
from dsv4_quant.fingerprints.parse import parse_fingerprint, read_fingerprint
from dsv4_quant.fingerprints.prompts import prompt_lengths
from dsv4_quant.fingerprints.record import Recording
from dsv4_quant.fingerprints.script import MAX_PROMPTS, Script, make_script
from dsv4_quant.fingerprints.sketch import ROW_BYTES, Digest
from dsv4_quant.fingerprints.watcher import SubLayer

CONFIGS = Path(__file__).parents[1] / "configs"


def test_round_trip(recording: Recording, tmp_path: Path) -> None:
    path = tmp_path / "fingerprint.json"
    path.write_bytes(to_json(recording.fingerprint))
    assert read_fingerprint(path) == recording.fingerprint
    assert to_json(read_fingerprint(path)) == path.read_bytes()
    assert path.stat().st_size < 64 << 10
    assert max(map(len, path.read_text().splitlines())) < 4000, "lines that a diff can show"


def worst(name: str, prompts: int | None) -> tuple[Script, Fingerprint]:
    """A fingerprint of a published model in which everything is as long as it can be."""
    config = read_config(CONFIGS / f"{name}.json")
    lengths = prompt_lengths(config) if prompts is None else [100] * prompts
    token = config.vocab_size - 1
    script = make_script(config, [[token] * length for length in lengths])
    digest = Digest("0" * 32, -1.2345678e-05, (-1.2345678e-05,) * 4)
    blocks = config.num_hidden_layers + script.mtp
    every = tuple(range(config.n_routed_experts))
    rows = bytes(ROW_BYTES * sum(map(len, script.rows)))
    measured = Measured(
        machine=Machine("x86_64", "AVX512", "2.13.0", 1),
        model=describe_model(config),
        formats={"dense": "fp8 128x128 e8m0", "expert": "fp4 1x32 e8m0"},
        value_digest="0" * 64,
        coverage=coverage(config, script, [every] * blocks),
        experts_hit=(every,) * blocks,
        tables={f"layers.{layer}": "0" * 32 for layer in range(blocks)} | {"embed": "0" * 32},
        logits=(digest,) * len(lengths),
        mtp_logits=(digest,) * len(lengths) if script.mtp else (),
        streams=tuple(
            SubLayer(layer, part, (digest,) * len(lengths), rows)
            for layer in range(blocks)
            for part in ("attn", "ffn")
        ),
    )
    spot = Spot(tuple(range(token - TOP + 1, token + 1)), (-1.23456789e-05,) * TOP, 12.3456789)
    spots = tuple((spot,) * len(places) for places in script.spots)
    return script, Fingerprint("dsv4-quant 0.1.0", script, spots, measured)


@pytest.mark.parametrize("prompts", [None, MAX_PROMPTS - 2])
@pytest.mark.parametrize("name", ["V4-Flash", "V4-Pro", "V4-Flash-0731", "V4-Pro-0813"])
def test_the_largest_models_fit(name: str, prompts: int | None) -> None:
    script, fingerprint = worst(name, prompts)
    check_size(read_config(CONFIGS / f"{name}.json"), script)
    data = to_json(fingerprint)
    assert 64 << 10 < len(data) <= MAX_BYTES
    assert parse_fingerprint(json.loads(data)) == fingerprint


def test_what_would_not_fit_is_refused_before_the_pass() -> None:
    config = read_config(CONFIGS / "V4-Pro.json")
    script = make_script(config, [[0] * 8000] * 8)
    with pytest.raises(UsageError, match="fewer or shorter prompts"):
        check_size(config, script)
    _, fits = worst("V4-Pro", None)
    large = replace(fits, script=replace(fits.script, prompts=((129279,) * 8192,) * 4))
    with pytest.raises(UsageError, match="more than"):
        to_json(large)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside, containers too."""
    if path:
        yield path
    for key, inside in (
        value.items()
        if isinstance(value, dict)
        else (enumerate(value) if isinstance(value, list) else ())
    ):
        yield from leaves(inside, (*path, key))


def edited(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with one value replaced; ``...`` removes it."""
    new = copy.deepcopy(document)
    inside = new
    for key in path[:-1]:
        inside = inside[key]
    if value is ...:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return new


@pytest.fixture(scope="module")
def document(recording: Recording) -> Any:
    small = json.loads(to_json(recording.fingerprint))
    for prompt in small["prompts"]:
        prompt["spots"] = prompt["spots"][:2]
    return small


strange = st.sampled_from(
    [..., None, True, -1, 1 << 70, 1.5, 1e300, "", "x", "é" * 500, "0" * 32, [], [[]], {}, {"a": 1}]
)


@given(data=st.data())
def test_one_wrong_value_is_refused_or_means_something(document: Any, data: st.DataObject) -> None:
    """No edit ends in anything but a fingerprint or a ValueError with a short text."""
    path = data.draw(st.sampled_from(list(leaves(document))))
    new = edited(document, path, data.draw(strange))
    try:
        made = parse_fingerprint(new)
    except ValueError as refused:
        assert 10 < len(str(refused)) < 400
    else:
        assert len(made.script.prompts) == len(made.spots)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("version",), 2, "version 2; this tool reads 1"),
        (("format",), "dsv4-manifest", "does not say format dsv4-fingerprint"),
        (("prompts", 0, "tokens", 0), -1, r"prompts\[0\]\.tokens\[0\] is -1"),
        (("prompts", 1, "spots", 1, "position"), 0, "not in ascending order"),
        (("prompts", 1, "spots", 1, "ids", 1), 1 << 24, "not an integer from 0"),
        (("prompts", 1, "spots", 1, "logits", 1), None, "not a number"),
        (("prompts", 1, "spots", 0, "logits"), [1.0], "does not go with ids"),
        (("prompts", 2, "rows"), [5, 4], "not in ascending order"),
        (("prompts", 2, "rows"), [17], "from 0 to 16"),
        (("pass", "arithmetic"), "fast", "'exact' or 'deployed'"),
        (("streams", 3, "part"), "attn", "attn and ffn of layer after layer"),
        (("streams", 3, "rows"), "AAAA", "does not go with the prompts' rows"),
        (("streams", 3, "rows"), "AAA", "not base64"),
        (("streams", 3), ..., "not a list of 12 entries"),
        (("experts_hit", 0), "g", "which cannot be"),
        (("model", "num_hidden_layers"), 0, "not an integer from 1"),
        (("surprise",), 1, "unknown key 'surprise'"),
        (("machine", "revision"), ..., "has no 'revision'"),
    ],
)
def test_every_refusal_says_where(
    document: Any, path: tuple[Any, ...], value: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        parse_fingerprint(edited(document, path, value))


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff", b'{"format": NaN}', b"[" * 100_000, b" " * (MAX_BYTES + 1)]
)
def test_no_fingerprint_at_all(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(text)
    with pytest.raises(UnreadableError, match=r"f\.json"):
        read_fingerprint(path)
    with pytest.raises(UnreadableError, match="No such file"):
        read_fingerprint(tmp_path / "none.json")
