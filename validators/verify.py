"""The verdict on a checkpoint: every level that was asked for, all findings, sorted.

Levels are stages that add checks and findings to one report; each includes those before it.
Of several processes each judges some files and weights; the first concludes, and its report is
what all return.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.digest import model_digest
from dsv4_quant.checkpoint.panels import usable_cores
from dsv4_quant.checkpoint.sums import HashKind
from dsv4_quant.errors import UsageError
from dsv4_quant.hub import published_sha256
from dsv4_quant.progress import Progress
from dsv4_quant.team import Team
from dsv4_quant.validators.against import judge_against
from dsv4_quant.validators.checksums import Hashes, files_to_hash, judge_hashes
from dsv4_quant.validators.claims import Claims, read_claims
from dsv4_quant.validators.division import divided
from dsv4_quant.validators.present import present_files
from dsv4_quant.validators.report import (
    LEVELS,
    Check,
    Finding,
    Level,
    Report,
    Rounded,
    error,
    ordered,
)
from dsv4_quant.validators.requantised import stated_sqnr
from dsv4_quant.validators.structure import judge_structure
from dsv4_quant.validators.subject import Subject
from dsv4_quant.validators.values import Found, ValuesPass
from dsv4_quant.validators.work import Hashed, Work

if TYPE_CHECKING:
    from dsv4_quant.fingerprints.gates import Gate
    from dsv4_quant.model import Reading
    from dsv4_quant.model.on_device import Device


def verify(
    path: str | Path,
    level: Level = "values",
    *,
    against: str | Path | None = None,
    fingerprint: Path | None = None,
    gate: Gate | None = None,
    workers: int | None = None,
    device: Device = "auto",
    progress: Progress | None = None,
    team: Team | None = None,
) -> Report:
    """Judges a checkpoint folder, in either layout.

    Args:
        path: the folder.
        level: structure (headers, index, configs), checksums (every byte against manifest,
            SHA256SUMS or B3SUMS and the hub), values (every number) or forward (what the model
            says); each includes those before it.
        against: another checkpoint's folder, in any layout and format, whose values, config and
            small files must be the same; weights that the manifest says were rounded must be made
            of its values, with the error that is stated. Needs the level ``values`` at least.
        fingerprint: what the level ``forward`` compares with.
        gate: bit, numeric or lossy; if not given, the strictest that the machines allow, or lossy
            where the manifest says that weights were rounded from what the fingerprint is of.
        workers: threads of a process; one per core if not given.
        device: what computes the products of the forward pass: cpu, the processor; cuda, a GPU;
            auto, a GPU where there is one that passes its test. It changes no bit.
        progress: is told how far it is.
        team: the processes that share the work.

    Raises:
        UnreadableError: the folder, or the other one, is no checkpoint at all.
        UsageError: the level and what it is to compare with do not go together.
    """
    return judge(
        path, level,
        against=against, fingerprint=fingerprint, gate=gate, workers=workers, device=device,
        progress=progress, team=team,
    ).report  # fmt: skip


@dataclass(frozen=True, slots=True)
class Judgement:
    """A report, and what was computed on the way."""

    report: Report
    subject: Subject
    sizes: Mapping[str, int]
    hashes: Mapping[str, Hashes]
    digests: Mapping[str, str]


def judge(
    path: str | Path,
    level: Level = "values",
    *,
    against: str | Path | None = None,
    fingerprint: Path | None = None,
    gate: Gate | None = None,
    workers: int | None = None,
    device: Device = "auto",
    progress: Progress | None = None,
    team: Team | None = None,
    to_pin: HashKind | None = None,
) -> Judgement:
    """``verify``, with all that it found out.

    ``to_pin``: what manifest and SHA256SUMS say is not asked, and every file is hashed so.
    """
    _check_request(level, against, fingerprint)
    began, team = time.monotonic(), team or Team()
    if device == "cuda" and fingerprint is not None:
        from dsv4_quant.kernels import gpu_torch  # PyTorch, which only a pass needs

        gpu_torch.find_gpu(team.local)  # better now than after hours of reading
    progress = team.watched(progress)
    has_bytes, has_values = LEVELS.index(level) >= 1, LEVELS.index(level) >= 2
    with ExitStack() as stack:
        other = None if against is None else stack.enter_context(Checkpoint.open(against))
        progress.stage("structure")
        subject = Subject.open(path)
        sizes, findings = present_files(subject.root)
        findings += judge_structure(subject, sizes)
        checks = [_structure_check(subject, time.monotonic() - began)]
        work, claims = Work(subject.root, sizes, progress), Claims()
        if to_pin:
            work.to_hash = dict.fromkeys(sizes, (to_pin,))
        elif has_bytes:
            claims, wrong = read_claims(subject, published_sha256(subject.root))
            work.to_hash = files_to_hash(claims, sizes)
            findings += wrong
        values = _values_pass(subject, other, claims, progress, stack) if has_values else None
        progress.stage("values" if has_values else level)
        _work_together(work, values, workers or usable_cores(team.sharing), team)
    hashed = work.found
    if has_bytes:
        findings += [*hashed.findings, *judge_hashes(claims, sizes, hashed.hashes)]
        checks.append(hashed.check())
    if has_values:
        findings += [] if other is None else judge_against(subject, other)
        wrong, more = _conclude(subject, values)
        findings += wrong
        checks += more
    said = reading = None
    if fingerprint is not None:
        wrong, check, said, reading = _forward(
            subject, fingerprint, gate, workers, device, progress, team
        )
        findings += wrong
        checks.append(check)
    digests = {} if values is None else values.found.digests
    report = team.lead(
        lambda: Report(
            str(path), level, tuple(checks), ordered(findings),
            _model_digest(subject, digests), time.monotonic() - began,
            said, reading,
            None if other is None or values is None else _rounded(values, claims),
        )
    )  # fmt: skip
    return Judgement(report, subject, sizes, hashed.hashes, digests)


def _work_together(work: Work, values: ValuesPass | None, workers: int, team: Team) -> None:
    """Each process does its part; what all have found is then in the first's."""
    if team.size > 1:
        weights = {} if values is None else values.sizes()
        files = {file: work.sizes[file] for file in work.to_hash}
        seen = [sorted(held.items()) for held in (work.sizes, files, weights)]
        team.agree(lambda: blake3(repr(seen).encode()).hexdigest(), "checkpoint")
        mine = divided(files, weights, team.size)[team.rank]
        work.to_hash = {file: kinds for file, kinds in work.to_hash.items() if file in mine.files}
        if values is not None:
            values.choose(mine.weights)

    def part() -> tuple[Hashed, Found | None]:
        work.run(values, workers)
        return work.found, None if values is None else values.found

    for hashed, found in team.gather(part)[1:]:
        work.found.add(hashed)
        if values is not None and found is not None:
            values.found.add(found)


def _check_request(level: str, against: str | Path | None, fingerprint: Path | None) -> None:
    if level not in LEVELS:
        raise UsageError(f"No such level: {level}", hint=f"Levels: {', '.join(LEVELS)}.")
    if fingerprint is not None and level != "forward":
        raise UsageError(
            f"The level {level} runs no forward pass to compare with a fingerprint",
            hint="Leave --level out, or say --level forward.",
        )
    if level == "forward" and fingerprint is None:
        raise UsageError(
            "The level forward compares with a fingerprint, and none was given",
            hint="`dsv4-quant fingerprint` records one.",
        )
    if against is not None and LEVELS.index(level) < LEVELS.index("values"):
        raise UsageError(
            f"The level {level} reads no values to compare",
            hint="Leave --level out, or say --level values.",
        )


def _structure_check(subject: Subject, seconds: float) -> Check:
    folder = subject.folder
    weights = 0 if subject.catalogue is None else len(subject.catalogue.specs)
    return Check("structure", len(folder.headers), weights, folder.header_bytes, 0, seconds)


def _values_pass(
    subject: Subject,
    other: Checkpoint | None,
    claims: Claims,
    progress: Progress,
    stack: ExitStack,
) -> ValuesPass | None:
    """The pass over all weights that can be read; None where none can."""
    checkpoint = subject.checkpoint()
    if checkpoint is None:
        return None
    opened = stack.enter_context(checkpoint)
    return ValuesPass(subject, opened, other, claims.manifest, progress.advance)


def _conclude(subject: Subject, values: ValuesPass | None) -> tuple[list[Finding], list[Check]]:
    if values is None:  # nobody can say what the bytes mean: everything was skipped
        held = sum(len(header.entries) for header in subject.folder.headers.values())
        return [], [Check("values", skipped=held)]
    return values.conclude()


def _rounded(values: ValuesPass, claims: Claims) -> Rounded | None:
    """Of a checkpoint whose manifest has a section on rounding."""
    manifest = claims.manifest
    if manifest is None or manifest.requantised is None:
        return None
    declared = sum(record.source is not None for record in manifest.tensors.values())
    return Rounded(len(values.rounded), declared, stated_sqnr(manifest))


def _forward(
    subject: Subject,
    fingerprint: Path,
    gate: Gate | None,
    workers: int | None,
    device: Device,
    progress: Progress,
    team: Team,
) -> tuple[list[Finding], Check, str, Reading | None]:
    """The pass, unless a weight is missing: the other levels say which."""
    from dsv4_quant.validators.forward import check_fingerprint  # only here: it loads PyTorch

    began = time.monotonic()
    ckpt = subject.checkpoint()
    if ckpt is None or subject.catalogue is None or subject.catalogue.specs.keys() - subject.sound:
        text = "the forward pass was not run"
        found = error("fingerprint", text, "Weights are missing; the other findings say which.")
        return [found], Check("forward"), text, None
    with ckpt:
        verdict = check_fingerprint(
            ckpt, fingerprint,
            gate=gate, threads=workers, device=device, progress=progress, team=team,
        )  # fmt: skip
    reading = verdict.reading
    check = Check(
        "forward",
        tensors=verdict.weights,
        bytes=0 if reading is None else reading.bytes_read,
        seconds=time.monotonic() - began,
    )
    return list(verdict.findings), check, verdict.text, reading


def _model_digest(subject: Subject, digests: Mapping[str, str]) -> str | None:
    """The whole model's, if every weight has one."""
    if subject.catalogue is None or len(digests) != len(subject.catalogue.specs):
        return None
    return model_digest(digests)
