"""Three gates: how equal two fingerprints must be, and which gate applies.

bit      Every digest is equal. For re-expressions of the same weights (layout, GPU count, lossless
         format), judged on one class of machine in ``exact`` arithmetic. A changed weight that any
         prompt uses does not pass.
numeric  Equal but for the last bits of ``exp`` and its like: between classes of machines, in exact
         arithmetic with float32 activations only. All other settings amplify rounding until it
         says nothing. Even here a rounding can turn a near tie in the choice of experts or entries
         the other way, and everything that depends on that position then differs in earnest. So the
         demands are on the typical spot and prompt, and few may be further away. Tables must be
         equal: their digests come from no arithmetic.
lossy    The next-token distributions are close: for requantised weights, and for served models.
         It bounds what was lost. It cannot tell a small damage from a loss of the same size.

The limits come from measurements (tests/fingerprints/thresholds.json; measure_thresholds.py beside
it repeats them). Between the vector units of one CPU, logits differed by up to 3e-6 and streams by
up to 1e-6 of their size over 43 layers; numeric allows 100 times that. With so much noise, 2 of
20,000 choices of experts turned, and under 1 % of the positions felt it. Rounding the experts
of a synthetic model from FP8 to FP4 made a KL divergence of 0.03 nats, to 3 bits 0.08, to 2 bits
0.20, and faults in all experts 0.11 to 0.24. Published figures for a trained model (Llama 3 8B, by
llama.cpp) are 0.03 for 4 bits, 0.1 for 3, 0.3 for 2. Lossy draws its line between 3 bits and 2.
"""

from __future__ import annotations

from typing import Literal

from dsv4_quant.errors import UsageError
from dsv4_quant.fingerprints.compare import Comparison, Step
from dsv4_quant.fingerprints.document import Fingerprint, Measured

Gate = Literal["bit", "numeric", "lossy"]
GATES: tuple[Gate, ...] = ("bit", "numeric", "lossy")

NUMERIC_LOGIT = 3e-4
"""Typical (median) difference of a spot's logits or log-sum-exp, in nats, that numeric allows."""

NUMERIC_FAR = 0.1
"""Part of the spots that may differ by more."""

NUMERIC_STREAMS = 1e-4
"""Typical (median over prompts) distance of a layer's streams, as a part of their size."""

LOSSY_KL = 0.1
"""Mean KL divergence over the spots, in nats, that lossy allows."""

LOSSY_TOP1 = 0.9
"""Part of the spots at which the clearly likeliest token must be the same."""


def choose_gate(recorded: Fingerprint, fresh: Measured, asked: Gate | None) -> tuple[Gate, str]:
    """The gate that applies, and why. Raises UsageError where the asked one cannot be applied."""
    measured = recorded.measured
    if measured is None:
        if asked not in (None, "lossy"):
            raise UsageError(
                f"The {asked} gate needs a fingerprint of a forward pass; this one holds what a"
                " served model said",
                hint="Use --gate lossy.",
            )
        return "lossy", "the fingerprint holds only what a served model said"
    if asked is not None:
        return asked, "it was asked for"
    reasons = fresh.machine.differences(measured.machine)
    if recorded.script.arithmetic == "deployed":
        reasons += _rounds_otherwise(measured, fresh)
    if not reasons:
        return "bit", "recorded on the same class of machine"
    why = "; ".join(reasons)
    if (recorded.script.arithmetic, recorded.script.activations) == ("exact", "float32"):
        return "numeric", why
    return "lossy", f"{why}; and this arithmetic amplifies roundings"


def _rounds_otherwise(recorded: Measured, fresh: Measured) -> list[str]:
    """``deployed`` rounds the inputs of quantised weights, so their format moves its bits."""
    return [
        f"{kind} weights in {form} there, {fresh.formats[kind]} here"
        for kind, form in recorded.formats.items()
        if kind != "wo_a" and (form == "bf16") != (fresh.formats.get(kind, form) == "bf16")
    ]


def broken(found: Comparison, gate: Gate) -> list[str]:
    """The gate's demands that are not met, in words; none if it holds."""
    if found.is_equal:
        return []
    if gate == "lossy":
        return _too_lossy(found)
    failed = []
    if found.tables:
        failed.append(f"tables differ in {len(found.tables)} groups of weights")
    different = sum(not step.is_equal for step in found.steps)
    if gate == "bit" and different:
        failed.append(f"{different} of {len(found.steps)} steps of the pass differ in their bits")
    return failed + (_too_far(found) if gate == "numeric" else [])


def _too_lossy(found: Comparison) -> list[str]:
    failed = []
    if found.kl is not None and found.kl > LOSSY_KL:
        failed.append(f"mean KL divergence {found.kl:.3g} nats, allowed {LOSSY_KL}")
    if found.top1 is not None and found.top1 < LOSSY_TOP1:
        failed.append(
            f"the likeliest token is the same at {found.top1:.0%} of the {found.clear} spots that"
            f" have a clear one, demanded {LOSSY_TOP1:.0%}"
        )
    if found.kl is None and found.top1 is None:
        failed.append("no log-probabilities, and no spot with a clearly likeliest token")
    return failed


def _too_far(found: Comparison) -> list[str]:
    failed = []
    if (found.logit or 0) > NUMERIC_LOGIT:
        failed.append(f"logits typically differ by {found.logit:.3g}, allowed {NUMERIC_LOGIT}")
    if (far := found.far(NUMERIC_LOGIT)) > NUMERIC_FAR:
        failed.append(
            f"{far:.0%} of the spots differ by more than {NUMERIC_LOGIT}, allowed {NUMERIC_FAR:.0%}"
        )
    if begins(found, "numeric") is not None:
        failed.append(f"streams typically differ by more than {NUMERIC_STREAMS} of their size")
    return failed


def begins(found: Comparison, gate: Gate) -> Step | None:
    """Where a difference begins that the gate does not allow; for lossy, where it grows most."""
    if gate == "bit":
        return next((step for step in found.steps if not step.is_equal), None)
    if gate == "numeric":
        return next((step for step in found.steps if step.typical > NUMERIC_STREAMS), None)
    most, place, before = 0.0, None, 0.0
    for step in found.steps:
        if step.typical - before > most:
            most, place = step.typical - before, step
        before = max(before, step.typical)
    return place
