"""Does a checkpoint say what a fingerprint recorded? Needs the fingerprint, not its source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.errors import Dsv4Error, NotANumberError, UnreadableError, UsageError
from dsv4_quant.fingerprints.compare import Comparison, Step, compare
from dsv4_quant.fingerprints.document import Fingerprint, Measured, describe_model
from dsv4_quant.fingerprints.gates import Gate, begins, broken, choose_gate
from dsv4_quant.fingerprints.make import known_digest
from dsv4_quant.fingerprints.parse import read_fingerprint
from dsv4_quant.fingerprints.record import Recording, record
from dsv4_quant.fingerprints.script import Script
from dsv4_quant.fingerprints.suspects import suspects
from dsv4_quant.fingerprints.tables import tables_of
from dsv4_quant.progress import Progress
from dsv4_quant.validators.report import Finding, error, warning

CHECK = "fingerprint"

SMALLEST = 1e-7
"""A distance that the sketch's eight digits can still tell."""

LISTED = 24
"""Names of suspects in a finding."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which gate was applied and why, what was measured, and what is wrong."""

    gate: Gate | None
    """None if it never came to a comparison."""
    why: str
    comparison: Comparison | None
    findings: tuple[Finding, ...]
    weights: int = 0
    """How many weights the pass used."""

    @property
    def text(self) -> str:
        """One line: the gate, its reason and the figures."""
        if self.gate is None or self.comparison is None:
            return f"no gate was applied: {self.why}"
        found = self.comparison
        figures = []
        if found.top1 is not None:
            figures = [f"likeliest token {found.top1:.1%} of {found.clear} clear spots"]
        if found.kl is not None:
            figures.append(f"KL {found.kl:.2g} nats")
        if found.steps:
            equal = sum(step.is_equal for step in found.steps)
            figures.insert(0, f"{equal} of {len(found.steps)} steps bit-equal")
        return f"gate {self.gate} ({self.why}): {', '.join(figures)}"


def check_fingerprint(
    ckpt: Checkpoint,
    fingerprint: Fingerprint | Path,
    *,
    gate: Gate | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Runs the fingerprint's prompts and compares.

    Args:
        ckpt: in any layout, format and GPU count.
        gate: the one to apply; if not given, the strictest that the two machines allow.
        threads: for the pass; they change no bit.

    Raises:
        UnreadableError: the fingerprint cannot be read.
        UsageError: the gate cannot be applied to it, or the model has not its tokens.
    """
    recorded = read_fingerprint(fingerprint) if isinstance(fingerprint, Path) else fingerprint
    measured = recorded.measured
    if measured is not None and (wrong := tuple(_other_model(measured, ckpt))):
        return Verdict(None, "the config describes another model", None, wrong)
    _check_ids(recorded, ckpt)
    script, findings = _script(recorded.script, ckpt)
    try:
        fresh = record(ckpt, script, threads=threads, progress=progress)
    except (NotANumberError, UnreadableError) as stopped:
        meaning = "The pass was stopped there. `dsv4-quant verify` finds the weight, if one is NaN."
        found = error(CHECK, stopped.what, meaning, tensor=stopped.tensor)
        return Verdict(None, "the pass gave no numbers", None, (*findings, found))
    assert fresh.fingerprint.measured is not None
    chosen, why = choose_gate(recorded, fresh.fingerprint.measured, gate)
    comparison = compare(recorded, fresh)
    if measured is not None:
        findings += _digest_findings(measured, ckpt, chosen)
    findings += _judge(ckpt, comparison, chosen, why, fresh)
    used = _used(ckpt, fresh.fingerprint.measured, script)
    return Verdict(chosen, why, comparison, tuple(findings), used)


def _other_model(measured: Measured, ckpt: Checkpoint) -> Iterator[Finding]:
    here = describe_model(ckpt.config)
    for key in sorted(here.keys() | measured.model.keys()):
        mine, theirs = here.get(key), measured.model.get(key)
        if mine != theirs and not (key == "num_mtp_blocks" and mine == 0):
            yield error(CHECK, f"{key} {mine}", "The fingerprint is of another model, or one of"
                        " both configs is wrong.", expected=f"{key} {theirs}")  # fmt: skip


def _check_ids(recorded: Fingerprint, ckpt: Checkpoint) -> None:
    """Ids of tokens are the model's to check; those of spots it never sees."""
    highest = max(max(spot.ids) for prompt in recorded.spots for spot in prompt)
    if highest >= ckpt.config.vocab_size:
        raise UsageError(
            f"The fingerprint names token {highest}; the vocabulary ends at"
            f" {ckpt.config.vocab_size - 1}",
            hint="It is of a model with another tokenizer.",
        )


def _script(script: Script, ckpt: Checkpoint) -> tuple[Script, list[Finding]]:
    """What can be run on this checkpoint: some come without their MTP block."""
    if not script.mtp or ckpt.config.num_mtp_blocks:
        return script, []
    found = warning(CHECK, "no MTP block", "The fingerprint has one; its tensors are not judged.",
                    expected="the tensors under mtp.0")  # fmt: skip
    return replace(script, mtp=False), [found]


def _used(ckpt: Checkpoint, measured: Measured, script: Script) -> int:
    hit, blocks = measured.experts_hit, ckpt.config.num_hidden_layers + script.mtp
    return sum(
        spec.layer is None
        or (spec.layer < blocks and (spec.expert is None or spec.expert in hit[spec.layer]))
        for spec in ckpt.specs.values()
    )


def _digest_findings(measured: Measured, ckpt: Checkpoint, gate: Gate) -> list[Finding]:
    try:
        here = known_digest(ckpt.root)
    except Dsv4Error:  # the level "checksums" tells what is wrong with the manifest
        return []
    if gate == "lossy" or None in (here, measured.value_digest) or here == measured.value_digest:
        return []
    return [
        warning(
            CHECK,
            f"value digest {here}",
            "By the manifest some number differs from the source's; the prompts need not reach it.",
            expected=f"value digest {measured.value_digest}",
        )
    ]


def _judge(
    ckpt: Checkpoint, found: Comparison, gate: Gate, why: str, fresh: Recording
) -> Iterator[Finding]:
    """The gate's verdict, and where to look."""
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
