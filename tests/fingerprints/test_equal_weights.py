"""The same weights in another layout, GPU count or format: the same fingerprint, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.fingerprints.file import to_json
from dsv4_quant.fingerprints.make import make_fingerprint
from dsv4_quant.fingerprints.record import Recording, record
from dsv4_quant.validators.forward import check_fingerprint
from tests.folders import golden

REQUESTS = {
    "2 GPUs": Request("mp", 2),
    "FP8 experts": Request("hf", 1, "fp8"),
    "FP8 experts on 4 GPUs": Request("mp", 4, "fp8"),
    "all BF16": Request("hf", 1, "bf16", "bf16"),
}


def said(data: bytes) -> dict[str, Any]:
    """Everything but how the weights are stored and whether a manifest names their digest."""
    document: dict[str, Any] = json.loads(data)
    return {k: v for k, v in document.items() if k not in ("formats", "value_digest")}


@pytest.fixture(scope="module", params=REQUESTS, ids=REQUESTS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(golden("tiny-fp4"), out, REQUESTS[request.param], workers=2)
    return out


def test_fingerprints_are_equal_bytes(converted: Path, recording: Recording) -> None:
    again = make_fingerprint(converted, threads=1)
    assert said(to_json(again)) == said(to_json(recording.fingerprint))
    assert again.measured is not None and again.measured.value_digest is not None


def test_the_bit_gate_holds_without_the_source(converted: Path, recording: Recording) -> None:
    with Checkpoint.open(converted) as ckpt:
        verdict = check_fingerprint(ckpt, recording.fingerprint)
    assert (verdict.gate, verdict.findings) == ("bit", ())
    assert verdict.comparison is not None and verdict.comparison.is_equal
    assert verdict.text.startswith("gate bit (recorded on the same class of machine): 14 of 14")


def test_deployed_is_equal_where_the_same_is_rounded(converted: Path) -> None:
    """Weights in BF16 meet inputs that nobody rounds: then only the lossy gate applies."""
    recorded = make_fingerprint(
        golden("tiny-fp4"), [list(range(20))], arithmetic="deployed", activations="bfloat16"
    )
    with Checkpoint.open(converted) as ckpt:
        verdict = check_fingerprint(ckpt, recorded)
        is_bf16 = ckpt.catalogue.formats.experts.kind == "bf16"
    assert verdict.findings == ()
    assert verdict.gate == ("lossy" if is_bf16 else "bit")
    assert verdict.comparison is not None and verdict.comparison.is_equal != is_bf16


@pytest.mark.parametrize("arithmetic", ["exact", "deployed"])
def test_threads_move_no_bit(arithmetic: Any, recording: Recording) -> None:
    script = recording.fingerprint.script
    short = replace(
        script,
        prompts=tuple(prompt[:20] for prompt in script.prompts[2:]),
        spots=((0, 19),) * 3,
        rows=((3, 19),) * 3,
        arithmetic=arithmetic,
    )
    short = replace(short, prompts=((*short.prompts[0], 1, 2, 3), *short.prompts[1:]))
    with Checkpoint.open(golden("tiny-fp4")) as ckpt:
        one, two = (record(ckpt, short, threads=n).fingerprint for n in (1, 2))
    assert to_json(one) == to_json(two)
