"""Does a checkpoint say what a fingerprint recorded? Needs the fingerprint, not its source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from dsv4_quant.errors import (
    Dsv4Error,
    NotANumberError,
    SourceDamagedError,
    UnreadableError,
    UsageError,
)
from dsv4_quant.fingerprints.compare import Comparison, compare
from dsv4_quant.fingerprints.document import Fingerprint, Measured, describe_model
from dsv4_quant.fingerprints.gates import Gate, choose_gate
from dsv4_quant.fingerprints.parse import read_fingerprint
from dsv4_quant.fingerprints.record import record
from dsv4_quant.fingerprints.script import Script
from dsv4_quant.model import Reading
from dsv4_quant.model.on_device import Device
from dsv4_quant.progress import Progress
from dsv4_quant.team import Team
from dsv4_quant.validators.apart import CHECK, findings_of
from dsv4_quant.validators.report import Finding, error, warning


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
    reading: Reading | None = None
    """What it read, if it came to its end."""

    @property
    def text(self) -> str:
        """One line: the gate, its reason and the figures."""
        if self.gate is None or self.comparison is None:
            return f"no gate was applied: {self.why}"
        found = self.comparison
        figures = []
        if found.top1 is not None:
            clear = f"the {found.clear} spots that have a clear one"
            figures = [f"likeliest token the same at {found.top1:.1%} of {clear}"]
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
    device: Device = "auto",
    progress: Progress | None = None,
    team: Team | None = None,
) -> Verdict:
    """Runs the fingerprint's prompts and compares.

    Args:
        ckpt: in any layout, format and GPU count.
        gate: the one to apply; if not given, lossy where the manifest says that weights were
            rounded from what the fingerprint is of, else the strictest that both machines allow.
        threads: of a process, for the pass; they change no bit.
        device: what computes the products, as in ``model.forward``; it changes no bit either.
        team: the processes that share the prompts.

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
        fresh = record(ckpt, script, threads=threads, device=device, progress=progress, team=team)
    except (NotANumberError, SourceDamagedError, UnreadableError) as stopped:
        meaning = "The pass was stopped there. `dsv4-quant verify` names every damaged weight."
        found = error(CHECK, stopped.what, meaning, tensor=stopped.tensor)
        return Verdict(None, "the pass was stopped", None, (*findings, found))
    assert fresh.fingerprint.measured is not None
    manifest = _manifest(ckpt.root)
    chosen, why = choose_gate(recorded, fresh.fingerprint.measured, gate)
    if gate is None and measured is not None and (rounded := _is_of_source(measured, manifest)):
        chosen, why = "lossy", rounded
    comparison = compare(recorded, fresh)
    if measured is not None and manifest is not None:
        findings += _digest_findings(measured, manifest, chosen)
    findings += findings_of(ckpt, comparison, chosen, why, fresh)
    used = _used(ckpt, fresh.fingerprint.measured, script)
    return Verdict(chosen, why, comparison, tuple(findings), used, fresh.reading)


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


def _manifest(root: Path) -> Manifest | None:
    try:
        return read_manifest(root / MANIFEST) if (root / MANIFEST).exists() else None
    except Dsv4Error:  # the level "checksums" tells what is wrong with it
        return None


def _is_of_source(measured: Measured, manifest: Manifest | None) -> str | None:
    """Why the pass cannot be equal: the weights were rounded after the fingerprint was recorded.

    None for a fingerprint of the rounded weights themselves, or of anything else.
    """
    if manifest is None or manifest.requantised is None:
        return None
    count = sum(record.source is not None for record in manifest.tensors.values())
    if not count:
        return None
    said = f"by the manifest {count:,} weights were rounded"
    if measured.value_digest is None:
        return f"{said}, and the fingerprint does not say of which values it is"
    is_of_source = measured.value_digest == manifest.source_digest
    return f"{said}, from those of the fingerprint" if is_of_source else None


def _digest_findings(measured: Measured, manifest: Manifest, gate: Gate) -> list[Finding]:
    here = manifest.value_digest
    if gate == "lossy" or measured.value_digest in (None, here):
        return []
    return [
        warning(
            CHECK,
            f"value digest {here}",
            "By the manifest some number differs from the source's; the prompts need not reach it.",
            expected=f"value digest {measured.value_digest}",
        )
    ]
