"""What to say of a comparison with a fingerprint: the verdict, and the tensors to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.fingerprints.compare import Comparison, Step
from dsv4_quant.fingerprints.gates import Gate, begins, broken
from dsv4_quant.fingerprints.record import Recording
from dsv4_quant.fingerprints.suspects import suspects
from dsv4_quant.fingerprints.tables import tables_of
from dsv4_quant.validators.report import Finding, error, warning

CHECK = "fingerprint"

SMALLEST = 1e-7
"""A distance that the sketch's eight digits can still tell."""

LISTED = 24
"""Names of suspects in a finding."""


def findings_of(
    ckpt: Checkpoint, found: Comparison, gate: Gate, why: str, fresh: Recording
) -> Iterator[Finding]:
    """The gate's verdict on a comparison, and where to look. None if all is well."""
    demands = broken(found, gate)
    if not demands:
        if gate != "lossy" and not found.is_equal:
            yield _holds_numerically(found, why)
        return
    advice = {
        "bit": "The weights are not those of the fingerprint. If they were requantised on purpose,"
        " judge them with --gate lossy.",
        "numeric": "More than rounding: the weights, or a tensor's interpretation, differ.",
        "lossy": "More than requantising does: tokens will differ.",
    }
    apart = "" if found.kl is None else f"; KL {found.kl:.2g} nats"
    summary = f"gate {gate} does not hold ({why}): {'; '.join(demands)}{apart}"
    yield error(CHECK, summary, advice[gate])
    if gate != "lossy" and found.tables:
        yield _table_finding(ckpt, found)
    if (step := begins(found, gate)) is not None:
        yield _place(ckpt, step, gate, fresh)


def _holds_numerically(found: Comparison, why: str) -> Finding:
    first = next(step for step in found.steps if not step.is_equal)
    return warning(
        CHECK,
        f"equal up to rounding, not bit for bit; from {first.name} on ({why})",
        "Another machine rounds so. Only the class of machine that recorded it can judge bits.",
    )


def _table_finding(ckpt: Checkpoint, found: Comparison) -> Finding:
    names = [name for group in found.tables for name in tables_of(ckpt, group)]
    if len(names) == 1:
        what = "values differ, though the pass need not show it"
        return error(CHECK, what, "Look at this tensor.", tensor=names[0])
    what = f"values differ in {', '.join(found.tables)}, though the pass need not show it"
    return error(CHECK, what, _look_at(names))


def _place(ckpt: Checkpoint, step: Step, gate: Gate, fresh: Recording) -> Finding:
    measured = fresh.fingerprint.measured
    assert measured is not None
    rows = step.rows if gate == "bit" else ()
    hit = () if step.layer is None else measured.experts_hit[step.layer]
    names = suspects(ckpt, step.layer, step.part, rows, hit)
    reached = sum(row.differs for row in rows)
    at = f" at {reached} of {len(rows)} positions" if rows else ""
    verb = "grow apart most" if gate == "lossy" else "first differ"
    size = f"{step.farthest:.2g}" if step.farthest > SMALLEST else f"less than {SMALLEST}"
    what = f"streams {verb} after {step.name}{at}, by up to {size} of their size"
    if step.part == "head":
        what = f"streams are equal, the logits of {step.name} differ"
    if len(names) == 1:
        return error(CHECK, what, "Look at this tensor.", tensor=names[0])
    return error(CHECK, what, _look_at(names))


def _look_at(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"Look at {', '.join(names[:LISTED])}{more}."
