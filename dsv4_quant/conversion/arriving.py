"""A conversion whose source arrives while it runs.

Nothing here does anything for a source that is a folder of whole files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dsv4_quant.checkpoint.digesting import digest_tensors
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.conversion.plan import CUT_BYTES, Plan, cuts
from dsv4_quant.conversion.reads import ranges
from dsv4_quant.hub.schedule import Range
from dsv4_quant.progress import Progress


def incoming_room(plan: Plan) -> int:
    """The disk space that what arrives takes at most, beside the output."""
    arrivals = plan.source.arrivals
    return 0 if arrivals is None else arrivals.room(plan.reads, _cuts(plan))


def vouched(plan: Plan, folder: Path, done: int) -> bool:
    """Whether what an earlier run made of the first ``done`` steps came from checked bytes."""
    arrivals = plan.source.arrivals
    return arrivals is None or arrivals.vouch(folder, plan.reads, done)


@contextmanager
def arriving(plan: Plan, folder: Path, done: int) -> Iterator[None]:
    """Lets the source arrive in ``folder`` for the steps from ``done`` on, during the block."""
    arrivals = plan.source.arrivals
    if arrivals is None:
        yield
        return
    with arrivals.serving(folder, plan.reads, _cuts(plan), done):
        yield


def _cuts(plan: Plan) -> list[int]:
    return [steps for steps, _ in cuts(plan)]


def digest_source(
    source: Checkpoint, folder: Path, *, workers: int, progress: Progress
) -> dict[str, str]:
    """``digest_tensors`` of all weights; a source that arrives does so in ``folder``."""
    arrivals = source.arrivals
    if arrivals is None:
        return digest_tensors(source, workers=workers, progress=progress)
    names = list(source.specs)
    reads = [
        tuple(found for tensor in source.stored(spec) for found in ranges(source, tensor))
        for spec in source.specs.values()
    ]
    marks = list(_marks(reads))
    digests: dict[str, str] = {}
    with arrivals.serving(folder, reads, marks, 0):
        for start, stop in zip([0, *marks[:-1]], marks, strict=True):
            digests |= digest_tensors(source, names[start:stop], workers=workers, progress=progress)
            arrivals.release(stop)
    return digests


def _marks(reads: Sequence[Sequence[Range]]) -> Iterator[int]:
    """How many weights are done at about every GiB read, and at the end."""
    since = 0
    for index, ranges_read in enumerate(reads, 1):
        since += sum(found.stop - found.start for found in ranges_read)
        if since >= CUT_BYTES or index == len(reads):
            yield index
            since = 0
