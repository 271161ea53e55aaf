"""What ``check_fingerprint`` says: of damage, of other models, of other machines."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import UnreadableError, UsageError
from dsv4_quant.fingerprints.document import Fingerprint, Measured
from dsv4_quant.fingerprints.file import to_json
from dsv4_quant.fingerprints.make import make_fingerprint
from dsv4_quant.fingerprints.parse import read_fingerprint
from dsv4_quant.fingerprints.record import Recording
from dsv4_quant.fingerprints.script import make_script
from dsv4_quant.formats.blocks import Tensor
from dsv4_quant.validators.forward import Verdict, check_fingerprint
from tests.fingerprints.damage import Altered, Flip
from tests.fingerprints.measure_thresholds import fp4_experts, grid_experts, scaled
from tests.folders import golden

GOLDEN = Path(__file__).with_name("tiny-fp4.json")
"""The fingerprint of the golden checkpoint; ``DSV4_UPDATE=1`` writes it anew."""


def errors(verdict: Verdict) -> list[str]:
    return [f"{one.what}. {one.meaning}" for one in verdict.findings if one.severity == "error"]


def test_the_golden_fingerprint(ckpt: Checkpoint) -> None:
    """Bit for bit where it was recorded, else numerically. If this fails in the bit gate after a
    change of ``model``, the change moved a bit: raise ``machine.REVISION``, or take it back."""
    if os.environ.get("DSV4_UPDATE"):
        GOLDEN.write_bytes(to_json(make_fingerprint(golden("tiny-fp4"))))
    verdict = check_fingerprint(ckpt, GOLDEN)
    assert not errors(verdict), verdict.text
    assert verdict.gate in ("bit", "numeric")


def test_one_code_of_every_expert(ckpt: Checkpoint, recording: Recording) -> None:
    """Each expert of each layer, w1, w2 and w3 in turn: one FP4 code becomes its neighbour."""
    script = recording.fingerprint.script
    few = make_script(ckpt.config, [script.prompts[-1][:40]])
    recorded = make_fingerprint(golden("tiny-fp4"), few.prompts)
    assert recorded.measured is not None
    draw, tried = np.random.default_rng(0), 0
    for layer, hit in enumerate(recorded.measured.experts_hit):
        prefix = f"layers.{layer}." if layer < 5 else "mtp.0."
        for expert in hit:
            name = f"{prefix}ffn.experts.{expert}.w{1 + (layer + expert) % 3}.weight"
            size = ckpt.read(name).codes.nbytes
            flip = Flip(name, False, int(draw.integers(size)), int(draw.choice([1, 16])))
            verdict = check_fingerprint(Altered(ckpt, flip), recorded, threads=1)
            assert verdict.gate == "bit" and errors(verdict), flip
            assert ("mtp.0 ffn" if layer == 5 else f"layer {layer} ffn") in errors(verdict)[1]
            assert name in errors(verdict)[1], flip
            tried += 1
    assert tried > 40


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("embed.weight", "layer 0 attn"),
        ("layers.2.attn.wo_a.weight", "layer 2 attn"),
        ("layers.3.ffn.shared_experts.w2.weight", "layer 3 ffn"),
        ("mtp.0.e_proj.weight", "mtp.0 attn"),
        ("head.weight", "the logits of head differ"),
        ("mtp.0.norm.weight", "the logits of mtp.0 head differ"),
    ],
)
def test_the_first_difference_is_named(
    name: str, first: str, ckpt: Checkpoint, recording: Recording
) -> None:
    """A row of ``name`` is zeroed, one that the prompts use."""

    def alter(read: str, held: Tensor) -> Tensor:
        if read != name:
            return held
        codes = held.codes.copy()
        codes.reshape(ckpt.specs[name].matrix[0], -1)[
            recording.fingerprint.script.prompts[0][0]
        ] = 0
        return replace(held, codes=codes)

    verdict = check_fingerprint(Altered(ckpt, alter), recording.fingerprint)
    assert first in errors(verdict)[-1] and name in errors(verdict)[-1] + "".join(
        one.tensor or "" for one in verdict.findings
    )


def test_nan_is_a_finding(ckpt: Checkpoint, recording: Recording) -> None:
    flip = Flip("layers.2.ffn.shared_experts.w1.weight", True, 0, 0)
    broken_scale = replace(flip, mask=int(ckpt.read(flip.name).scales.reshape(-1)[0]) ^ 0xFF)
    verdict = check_fingerprint(Altered(ckpt, broken_scale), recording.fingerprint)
    assert verdict.gate is None and "NaN or infinity after ffn of layer 2" in errors(verdict)[0]


def test_ranks_that_disagree_are_a_finding(recording: Recording, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(golden("tiny-fp4"), out, Request("mp", 2), workers=2)
    path, name = out / "model1-mp2.safetensors", "layers.3.ffn.gate.bias"
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + json.loads(raw[8:start])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(raw)
    with Checkpoint.open(out) as ckpt:
        verdict = check_fingerprint(ckpt, recording.fingerprint)
    assert verdict.gate is None and verdict.findings[0].tensor == name


def test_another_model_is_told_before_the_pass(recording: Recording) -> None:
    with Checkpoint.open(golden("tiny-fp4")) as ckpt:
        ckpt.config = replace(ckpt.config, routed_scaling_factor=2.5, rms_norm_eps=1e-5)
        verdict = check_fingerprint(ckpt, recording.fingerprint)
    assert verdict.gate is None and len(verdict.findings) == 2
    assert "expected rms_norm_eps 1e-06, found rms_norm_eps 1e-05" in errors(verdict)[0]


def test_a_checkpoint_without_its_mtp_block(recording: Recording, tmp_path: Path) -> None:
    """Some tools drop it: what is left is compared."""
    out = tmp_path / "out"
    convert(golden("tiny-fp4"), out, Request("hf", 1), workers=2)
    (out / MANIFEST).unlink()
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    shards = {file for name, file in index["weight_map"].items() if name.startswith("mtp.")}
    kept = {n: f for n, f in index["weight_map"].items() if not n.startswith("mtp.")}
    assert not shards & set(kept.values())
    for shard in shards:
        (out / shard).unlink()
    del index["metadata"]["total_size"]
    index["weight_map"] = kept
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((out / "config.json").read_bytes())
    config["num_nextn_predict_layers"] = 0
    (out / "config.json").write_text(json.dumps(config))
    with Checkpoint.open(out) as ckpt:
        verdict = check_fingerprint(ckpt, recording.fingerprint)
    assert verdict.gate == "bit" and not errors(verdict)
    assert [one.found for one in verdict.findings] == ["no MTP block"]


def moved(fingerprint: Fingerprint, **change: object) -> Fingerprint:
    assert fingerprint.measured is not None
    return replace(fingerprint, measured=replace(fingerprint.measured, **change))


def test_a_digest_that_differs_is_a_warning(recording: Recording, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(golden("tiny-fp4"), out, Request("mp", 1), workers=2)
    with Checkpoint.open(out) as ckpt:
        verdict = check_fingerprint(ckpt, moved(recording.fingerprint, value_digest="0" * 64))
        (out / MANIFEST).write_text("{}")
        other = check_fingerprint(ckpt, moved(recording.fingerprint, value_digest="0" * 64))
    assert not errors(verdict) and "value digest" in verdict.findings[0].what
    assert not other.findings, "a torn manifest is another level's finding"


def test_requantised_weights_pass_the_lossy_gate_and_no_other() -> None:
    recorded = make_fingerprint(golden("tiny-base"))
    with Checkpoint.open(golden("tiny-base")) as ckpt:
        fp4 = Altered(ckpt, fp4_experts)
        lossy = check_fingerprint(fp4, recorded, gate="lossy")
        assert not lossy.findings and 0.01 < (lossy.comparison.kl or 0) < 0.1
        strict = check_fingerprint(fp4, recorded)
        assert "--gate lossy" in errors(strict)[0]
        two_bits = check_fingerprint(Altered(ckpt, grid_experts(1)), recorded, gate="lossy")
        doubled = check_fingerprint(Altered(ckpt, scaled(".experts.", 2)), recorded, gate="lossy")
    for verdict in (two_bits, doubled):
        assert "mean KL divergence" in errors(verdict)[0]
        assert "grow apart most after layer" in errors(verdict)[1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="has one vector unit")
def test_another_vector_unit_is_another_machine(ckpt: Checkpoint, tmp_path: Path) -> None:
    """PyTorch told to do without AVX rounds ``exp`` otherwise: numeric forgives, bit does not."""
    file = tmp_path / "f.json"
    done = subprocess.run(
        [sys.executable, "-m", "dsv4_quant", "fingerprint", str(ckpt.root), "--output", str(file)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recorded = read_fingerprint(file)
    verdict = check_fingerprint(ckpt, recorded)
    assert verdict.gate == "numeric" and "cpu DEFAULT there" in verdict.why
    assert not errors(verdict)
    found = verdict.comparison
    assert found is not None
    if not found.is_equal:
        assert "not bit for bit" in verdict.findings[0].what
        assert errors(check_fingerprint(ckpt, recorded, gate="bit"))


def test_what_cannot_be_done(ckpt: Checkpoint, recording: Recording, tmp_path: Path) -> None:
    served = replace(recording.fingerprint, measured=None)
    with pytest.raises(UsageError, match="served model"):
        check_fingerprint(ckpt, served, gate="bit")
    with pytest.raises(UnreadableError):
        check_fingerprint(ckpt, tmp_path / "none.json")
    spot = replace(served.spots[0][0], ids=(512, *served.spots[0][0].ids[1:]))
    with pytest.raises(UsageError, match="names token 512"):
        check_fingerprint(ckpt, replace(served, spots=((spot,), *served.spots[1:])))
    beyond = replace(
        served, script=replace(served.script, prompts=((600,), *served.script.prompts[1:]))
    )
    with pytest.raises(UsageError, match="holds token id 600"):
        check_fingerprint(ckpt, beyond)


def test_measured_is_what_it_says(recording: Recording) -> None:
    measured = recording.fingerprint.measured
    assert isinstance(measured, Measured)
    assert measured.formats["expert"] == "fp4 1x32 e8m0"
    assert len(measured.streams) == 12 and set(measured.tables) == {
        "embed", "layers.0", "layers.1", "layers.2", "layers.3", "layers.4", "mtp.0",
    }  # fmt: skip
    assert measured.coverage.missed == () and measured.coverage.experts_hit == (8,) * 6
