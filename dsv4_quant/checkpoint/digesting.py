"""The value digests of a checkpoint: streaming, on several threads, in bounded memory.

Processes that share the job take a run of weights each; all of them get all digests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from dsv4_quant.checkpoint.ahead import announced
from dsv4_quant.checkpoint.digest import LeafHasher, TensorDigest, model_digest
from dsv4_quant.checkpoint.panels import panel_rows, row_ranges, usable_cores, work_in_threads
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.checkpoint.sidecars import identity
from dsv4_quant.formats.blocks import Tensor
from dsv4_quant.progress import Progress
from dsv4_quant.team import Team
from dsv4_quant.team.shares import runs


def digest_tensors(
    checkpoint: Checkpoint,
    names: Iterable[str] | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    team: Team | None = None,
) -> dict[str, str]:
    """Hex digests by name, of all weights or of those named.

    ``workers`` are threads of one process.
    Raises NotANumberError at the first NaN, SourceDamagedError where ranks hold different copies,
    SourceChangedError when a file is cut short.
    """
    team = team or Team()
    progress, threads = team.watched(progress), workers or usable_cores(team.sharing)
    chosen = list(checkpoint.specs if names is None else names)
    team.agree(lambda: identity(checkpoint.folder, checkpoint.config), "checkpoint")
    mine = runs({name: _nbytes(checkpoint, name) for name in chosen}, team.size)[team.rank]
    parts = team.gather(lambda: _digests(checkpoint, mine, threads, progress))
    found = team.lead(lambda: {name: digest for part in parts for name, digest in part.items()})
    return {name: found[name] for name in chosen}


def _digests(
    checkpoint: Checkpoint, chosen: list[str], workers: int, progress: Progress
) -> dict[str, str]:
    progress.total(sum(_nbytes(checkpoint, name) for name in chosen))
    heights = {name: panel_rows(checkpoint.specs[name], ()) for name in chosen}
    found: dict[str, str] = {}

    def see(name: str, first_row: int, panel: Tensor) -> None:
        progress.advance(panel.nbytes)

    digest_panels(checkpoint, heights, lambda: see, found.__setitem__, workers)
    return found


def digest_panels(
    checkpoint: Checkpoint,
    heights: Mapping[str, int],
    onlooker: Callable[[], Callable[[str, int, Tensor], None]],
    digested: Callable[[str, str], None],
    workers: int,
) -> None:
    """Reads weights once, in panels, and digests them.

    Args:
        heights: by name, in the order of reading, the rows of a panel: a multiple of ``row_unit``.
        onlooker: is called once in each thread; what it returns is shown every panel that the
            thread has digested: the weight's name, the panel's first row, and the panel.
        digested: is told each weight's name and digest, by one thread at a time.
        workers: threads.
    """
    unfinished: dict[str, TensorDigest] = {}
    lock = threading.Lock()

    def panels() -> Iterator[tuple[str, int, int]]:
        for name, height in heights.items():
            rows, _ = checkpoint.specs[name].matrix
            unfinished[name] = TensorDigest(*checkpoint.specs[name].matrix)
            for start, stop in row_ranges(rows, height):
                yield name, start, stop

    def worker() -> Callable[[tuple[str, int, int]], None]:
        hasher, see = LeafHasher(), onlooker()

        def work(item: tuple[str, int, int]) -> None:
            name, start, stop = item
            panel = checkpoint.read_rows(name, start, stop, copies=True)
            leaves = list(hasher.leaves(name, panel, start))
            see(name, start, panel)
            with lock:  # a finished weight keeps its digest only: V4-Pro has 3 million leaves
                open_digest = unfinished[name]
                for leaf in leaves:
                    open_digest.add(*leaf)
                if open_digest.is_complete:
                    digested(name, open_digest.hexdigest())
                    del unfinished[name]

        return work

    items = announced(panels(), lambda item: checkpoint.announce(*item, copies=True))
    work_in_threads(items, worker, workers, checkpoint.halt)


def _nbytes(checkpoint: Checkpoint, name: str) -> int:
    return sum(tensor.nbytes for tensor in checkpoint.stored(checkpoint.specs[name]))


def digest(path: str | Path, *, workers: int | None = None, team: Team | None = None) -> str:
    """The value digest of a checkpoint folder: one line for the whole model.

    Raises UnreadableError, NotANumberError or SourceChangedError.
    """
    with Checkpoint.open(path) as checkpoint:
        return model_digest(digest_tensors(checkpoint, workers=workers, team=team))
