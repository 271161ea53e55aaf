"""Runs a script on a checkpoint and condenses the pass into a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsv4_quant import __version__
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.errors import NotANumberError
from dsv4_quant.fingerprints.coverage import coverage
from dsv4_quant.fingerprints.document import TOP, Fingerprint, Measured, Spot, describe_model
from dsv4_quant.fingerprints.machine import Machine
from dsv4_quant.fingerprints.script import Script
from dsv4_quant.fingerprints.sketch import digest
from dsv4_quant.fingerprints.tables import tables
from dsv4_quant.fingerprints.watcher import Routes, Watcher
from dsv4_quant.model import forward
from dsv4_quant.progress import NoProgress, Progress

TOOL = f"dsv4-quant {__version__}"

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Recording:
    """A fingerprint, and what a comparison needs beyond it."""

    fingerprint: Fingerprint
    logits: tuple[Floats, ...]
    """Per prompt ``[spots, vocab_size]``."""
    routes: Routes


def record(
    ckpt: Checkpoint,
    script: Script,
    *,
    value_digest: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Recording:
    """One forward pass.

    Args:
        value_digest: of the checkpoint, if it is known; it is written down.
        threads: they change no bit.

    Raises:
        UsageError: tokens that the model does not have.
        NotANumberError: a table or a layer's streams hold NaN or infinity; the pass ends there.
    """
    progress = progress or NoProgress()
    held = tables(ckpt, mtp=script.mtp, threads=threads, progress=progress)
    progress.stage("forward pass", "steps")
    watcher = Watcher(script, progress)
    result = forward(
        ckpt, script.prompts,
        arithmetic=script.arithmetic, activations=script.activations, mtp=script.mtp,
        observer=watcher, threads=threads,
    )  # fmt: skip
    logits = [prompt.numpy() for prompt in result.logits]
    digests = tuple(digest(prompt) for prompt in logits)
    mtp_digests = tuple(digest(prompt.numpy()) for prompt in result.mtp_logits or ())
    if not all(np.isfinite(one.norm) for one in (*digests, *mtp_digests)):
        raise NotANumberError("The logits hold NaN or infinity, the streams do not: see the head")
    config = ckpt.config
    kept = tuple(prompt[list(places)] for prompt, places in zip(logits, script.spots, strict=True))
    measured = Measured(
        machine=Machine.here(),
        model=describe_model(config),
        formats=formats(ckpt),
        value_digest=value_digest,
        coverage=coverage(config, script, result.experts_hit),
        experts_hit=tuple(tuple(experts) for experts in result.experts_hit),
        tables=held,
        logits=digests,
        mtp_logits=mtp_digests,
        streams=tuple(watcher.streams_seen),
    )
    spots = tuple(tuple(_spot(row) for row in rows) for rows in kept)
    return Recording(Fingerprint(TOOL, script, spots, measured), kept, watcher.routes)


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
