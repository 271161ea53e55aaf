"""Which gate applies, and what each demands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsv4_quant.errors import UsageError
from dsv4_quant.fingerprints import gates
from dsv4_quant.fingerprints.compare import Apart, Comparison, Step, compare, divergence
from dsv4_quant.fingerprints.document import Fingerprint, Measured
from dsv4_quant.fingerprints.gates import begins, broken, choose_gate
from dsv4_quant.fingerprints.machine import Machine
from dsv4_quant.fingerprints.record import Recording


def changed(fingerprint: Fingerprint, **script: str) -> Fingerprint:
    return replace(fingerprint, script=replace(fingerprint.script, **script))


def elsewhere(fingerprint: Fingerprint, **machine: object) -> Fingerprint:
    measured = fingerprint.measured
    assert measured is not None
    moved = replace(measured, machine=replace(measured.machine, **machine))
    return replace(fingerprint, measured=moved)


@pytest.fixture
def here(recording: Recording) -> Measured:
    assert recording.fingerprint.measured is not None
    return recording.fingerprint.measured


def test_the_strictest_gate_that_the_machines_allow(recording: Recording, here: Measured) -> None:
    recorded = recording.fingerprint
    assert choose_gate(recorded, here, None) == ("bit", "recorded on the same class of machine")
    for key, value in (("torch", "2.12.1"), ("cpu", "AVX2"), ("machine", "arm64"), ("revision", 7)):
        gate, why = choose_gate(elsewhere(recorded, **{key: value}), here, None)
        assert gate == "numeric" and f"{key} {value} there" in why


@pytest.mark.parametrize("script", [{"arithmetic": "deployed"}, {"activations": "bfloat16"}])
def test_what_amplifies_roundings_goes_to_lossy(
    script: dict[str, str], recording: Recording, here: Measured
) -> None:
    recorded = changed(recording.fingerprint, **script)
    assert choose_gate(recorded, here, None)[0] == "bit"
    gate, why = choose_gate(elsewhere(recorded, torch="2.12.1"), here, None)
    assert gate == "lossy" and "amplifies" in why


def test_deployed_rounds_what_meets_quantised_weights(recording: Recording, here: Measured) -> None:
    deployed = changed(recording.fingerprint, arithmetic="deployed")
    fp8 = replace(here, formats={**here.formats, "expert": "fp8 128x128 e8m0", "wo_a": "bf16"})
    assert choose_gate(deployed, fp8, None)[0] == "bit"
    bf16 = replace(here, formats={**here.formats, "expert": "bf16"})
    gate, why = choose_gate(deployed, bf16, None)
    assert gate == "lossy" and "expert weights in fp4 1x32 e8m0 there, bf16 here" in why
    assert choose_gate(recording.fingerprint, bf16, None)[0] == "bit"


def test_a_gate_that_is_asked_for(recording: Recording, here: Measured) -> None:
    for gate in gates.GATES:
        assert choose_gate(elsewhere(recording.fingerprint, cpu="x"), here, gate)[0] == gate
    served = replace(recording.fingerprint, measured=None)
    assert choose_gate(served, here, None)[0] == choose_gate(served, here, "lossy")[0] == "lossy"
    for gate in ("bit", "numeric"):
        with pytest.raises(UsageError, match="served model"):
            choose_gate(served, here, gate)


def test_this_machine_is_of_its_own_class() -> None:
    assert not Machine.here().differences(Machine.here())


EQUAL = Step("layer 0 attn", 0, "attn", True, 0.0, 0.0)
SPOT = Apart(0, 0, True, 0.0, 0.0)


def made(**change: object) -> Comparison:
    """Ten equal spots and steps, some of the spots and the last step changed."""
    spot = {key: change[key] for key in ("same_top", "kl", "logit") if key in change}
    count = change.get("count", 10)
    assert isinstance(count, int)
    step = {key: change[key] for key in ("is_equal", "typical", "farthest") if key in change}
    spots = [replace(SPOT, **spot)] * count + [SPOT] * (10 - count)
    return Comparison(tuple(spots), (*[EQUAL] * 9, replace(EQUAL, name="layer 4 attn", **step)))


def test_bit_forgives_nothing() -> None:
    assert not broken(made(), "bit")
    assert "1 of 10 steps" in broken(made(is_equal=False), "bit")[0]
    place = begins(made(is_equal=False), "bit")
    assert place is not None and place.name == "layer 4 attn"


def test_equal_bits_pass_every_gate() -> None:
    assert not any(broken(made(kl=9.0, logit=9.0, typical=9.0), gate) for gate in gates.GATES)


def test_numeric_forgives_rounding_and_few_ties() -> None:
    near, far = gates.NUMERIC_LOGIT / 2, gates.NUMERIC_LOGIT * 2
    assert not broken(made(is_equal=False, logit=near, typical=1e-6), "numeric")
    assert not broken(made(is_equal=False, logit=far, count=1, farthest=1.0), "numeric")
    assert "20% of the spots" in broken(made(is_equal=False, logit=far, count=2), "numeric")[0]
    assert "typically differ" in broken(made(is_equal=False, logit=far), "numeric")[0]
    assert "streams" in broken(made(is_equal=False, typical=2e-4), "numeric")[0]


def test_lossy_looks_at_the_distributions_alone() -> None:
    assert not broken(made(is_equal=False, logit=9.0, typical=0.5, kl=0.09), "lossy")
    assert "0.11 nats" in broken(made(is_equal=False, kl=0.11), "lossy")[0]
    assert not broken(made(is_equal=False, same_top=False, count=1), "lossy")
    assert (
        "80% of the 10 spots" in broken(made(is_equal=False, same_top=False, count=2), "lossy")[0]
    )
    assert not broken(made(is_equal=False, same_top=None), "lossy")


def test_lossy_points_where_the_distance_grows_most() -> None:
    sizes = [0.1, 0.12, 0.5, 0.55, 0.3, 0.6]
    steps = tuple(Step(f"{i}", i, "ffn", False, size, size) for i, size in enumerate(sizes))
    place = begins(Comparison((SPOT,), steps), "lossy")
    assert place is not None and place.layer == 2


def test_the_limits_stand_on_the_measurements() -> None:
    """thresholds.json, by measure_thresholds.py: what must pass passes by far."""
    measured = json.loads(Path(__file__).with_name("thresholds.json").read_bytes())
    for row in measured["numeric"]:
        assert 50 * row["logit_max"] < gates.NUMERIC_LOGIT
        assert 50 * row["streams_typical"] < gates.NUMERIC_STREAMS
        assert row["bit_equal"] == (row["unit"] != "default")
    noisy = next(row for row in measured["ties"] if row["logit_median"] > 1e-4)
    assert noisy["choices_turned"] > 0 and noisy["logit_median"] < gates.NUMERIC_LOGIT
    assert 10 * noisy["positions_beyond_10_medians"] < gates.NUMERIC_FAR
    kl = {row["what"]: row["kl"] for row in measured["lossy"]}
    assert 3 * kl["experts FP8 -> FP4"] < gates.LOSSY_KL
    assert (
        kl["experts FP8 -> 3 bit integers"] < gates.LOSSY_KL < kl["experts FP8 -> 2 bit integers"]
    )
    assert min(kl[what] for what in kl if "all" in what or "swapped" in what) > gates.LOSSY_KL


logits = hnp.arrays(np.float64, 12, elements=st.floats(-8, 8))


def log_softmax(x: np.ndarray) -> np.ndarray:
    top = x.max()
    lse: float = np.log(np.exp(x - top).sum()) + top
    return np.asarray(x - lse)


@given(logits, logits, st.integers(1, 12))
def test_divergence_of_a_part_is_a_lower_bound(one: np.ndarray, other: np.ndarray, k: int) -> None:
    p, q = log_softmax(one), log_softmax(other)
    whole = float((np.exp(p) * (p - q)).sum())
    best = np.argsort(-p)[:k]
    part = divergence(p[best], q[best])
    assert -1e-12 <= part <= whole + 1e-9
    if k == 12:
        assert part == pytest.approx(whole, abs=1e-9)
    assert divergence(p[best], p[best]) == 0  # and not nearly


def test_a_recording_against_itself(recording: Recording) -> None:
    found = compare(recording.fingerprint, recording)
    assert found.is_equal and found.top1 == 1
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.logit == pytest.approx(0, abs=1e-8), "nine digits of float32 are exact"
    assert [step.name for step in found.steps[:2]] == ["layer 0 attn", "layer 0 ffn"]
    assert [step.name for step in found.steps[-4:]] == [
        "head", "mtp.0 attn", "mtp.0 ffn", "mtp.0 head",
    ]  # fmt: skip
    assert not any(row.differs for step in found.steps for row in step.rows)
