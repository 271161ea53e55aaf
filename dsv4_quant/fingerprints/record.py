"""Runs a script on a checkpoint and condenses the pass into a fingerprint.

Several processes share the prompts: no bit of a prompt depends on those beside it. Each of them
reads every layer, and the longest prompt is the most that one has to compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dsv4_quant import __version__
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.panels import usable_cores
from dsv4_quant.errors import NotANumberError
from dsv4_quant.fingerprints.coverage import coverage
from dsv4_quant.fingerprints.document import TOP, Fingerprint, Measured, Spot, describe_model
from dsv4_quant.fingerprints.machine import Machine
from dsv4_quant.fingerprints.part import Part, joined
from dsv4_quant.fingerprints.script import Script
from dsv4_quant.fingerprints.tables import tables
from dsv4_quant.fingerprints.watcher import Routes, Watcher
from dsv4_quant.model import Reading, forward
from dsv4_quant.model.on_device import Device
from dsv4_quant.progress import Progress
from dsv4_quant.team import Team
from dsv4_quant.team.shares import shares

TOOL = f"dsv4-quant {__version__}"

Floats = NDArray[np.float32]

SAME_MACHINES = "Equal bits need processors of one kind and one version of PyTorch."


@dataclass(frozen=True, slots=True)
class Recording:
    """A fingerprint, and what a comparison needs beyond it."""

    fingerprint: Fingerprint
    logits: tuple[Floats, ...]
    """Per prompt ``[spots, vocab_size]``."""
    routes: Routes
    reading: Reading
    """Of the forward pass."""


def record(
    ckpt: Checkpoint,
    script: Script,
    *,
    value_digest: str | None = None,
    threads: int | None = None,
    device: Device = "auto",
    progress: Progress | None = None,
    team: Team | None = None,
) -> Recording:
    """One forward pass.

    Args:
        value_digest: of the checkpoint, if it is known; it is written down.
        threads: of a process; they change no bit.
        device: what computes the products, as in ``model.forward``; it changes no bit either.
        team: the processes that share the prompts; all of them get the recording.

    Raises:
        UsageError: tokens that the model does not have.
        NotANumberError: a table or a layer's streams hold NaN or infinity; the pass ends there.
    """
    team = team or Team()
    progress = team.watched(progress)
    team.agree(lambda: repr(Machine.here()), "class of machine", hint=SAME_MACHINES)
    threads = threads or (usable_cores(team.sharing) if team.size > 1 else None)
    held = tables(ckpt, mtp=script.mtp, threads=threads, progress=progress, team=team)
    progress.stage("forward pass", "steps")
    mine = shares(dict(enumerate(script.lengths)), team.size)[team.rank]
    run = partial(_run, ckpt, script, mine, threads, device, team.local, progress)
    parts = team.gather(lambda: run() if mine else None)
    found = team.lead(lambda: joined(script, [part for part in parts if part is not None]))
    measured = Measured(
        machine=Machine.here(),
        model=describe_model(ckpt.config),
        formats=formats(ckpt),
        value_digest=value_digest,
        coverage=coverage(ckpt.config, script, found.experts_hit),
        experts_hit=found.experts_hit,
        tables=held,
        logits=found.logits,
        mtp_logits=found.mtp_logits,
        streams=found.streams,
    )
    spots = tuple(tuple(_spot(row) for row in rows) for rows in found.kept)
    made = Fingerprint(TOOL, script, spots, measured)
    return Recording(made, found.kept, found.routes, found.reading)


def _run(
    ckpt: Checkpoint,
    script: Script,
    prompts: list[int],
    threads: int | None,
    device: Device,
    local: int,
    progress: Progress,
) -> Part:
    """What a pass shows of some prompts."""
    some = script.only(prompts)
    watcher = Watcher(some, progress)
    result = forward(
        ckpt, some.prompts,
        arithmetic=script.arithmetic, activations=script.activations, mtp=script.mtp,
        observer=watcher, threads=threads, keep_logits=False, device=device, local=local,
    )  # fmt: skip
    part = Part(
        prompts=tuple(prompts),
        logits=watcher.digests(mtp=False),
        mtp_logits=watcher.digests(mtp=True),
        kept=watcher.spots(),
        streams=tuple(watcher.streams_seen),
        routes=watcher.routes,
        experts_hit=tuple(tuple(experts) for experts in result.experts_hit),
        reading=result.reading,
    )
    if not all(np.isfinite(one.norm) for one in (*part.logits, *part.mtp_logits)):
        raise NotANumberError("The logits hold NaN or infinity, the streams do not: see the head")
    return part


def _spot(row: Floats) -> Spot:
    """The highest logits; of equal ones the lower id first."""
    ids = np.argsort(-row, kind="stable")[:TOP]
    return Spot(
        ids=tuple(int(one) for one in ids),
        logits=tuple(float(f"{value:.9g}") for value in row[ids]),  # nine digits: exact
        lse=float(f"{log_sum_exp(row):.9g}"),
    )


def log_sum_exp(row: Floats) -> float:
    """``log(sum(exp(x)))`` in float64."""
    values = row.astype(np.float64)
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))


def formats(ckpt: Checkpoint) -> dict[str, str]:
    """How the experts, wo_a and the other weights of a layer are stored."""
    found: dict[str, str] = {}
    for spec in ckpt.specs.values():
        if spec.kind != "fixed":
            found.setdefault(spec.kind, str(spec.format))
    return dict(sorted(found.items()))
