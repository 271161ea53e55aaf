"""How big a bite to take: rows of a weight that are read, hashed and cast at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from math import lcm
from typing import TypeVar

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint.digest import leaf_rows
from dsv4_quant.formats.blocks import Format

PANEL_VALUES = 1 << 22
"""Values in a panel, if memory allows: 2 MiB of FP4, 8 MiB of BF16."""

Item = TypeVar("Item")


def panel_rows(spec: TensorSpec, formats: Iterable[Format], values: int = PANEL_VALUES) -> int:
    """Rows per panel: whole digest leaves and whole blocks of every format, about ``values``."""
    unit = row_unit(spec, formats)
    return max(unit, values // spec.matrix[1] // unit * unit)


def row_unit(spec: TensorSpec, formats: Iterable[Format]) -> int:
    """The fewest rows that can be worked on alone."""
    rows = [form.block[0] for form in (spec.format, *formats) if form.block is not None]
    return lcm(leaf_rows(spec.matrix[1]), *rows)


def row_ranges(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each panel."""
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def usable_cores(sharing: int = 1) -> int:
    """Threads to use where nobody says: one per core that this process may run on.

    ``sharing``: how many processes of one job run on these cores (``team``).
    """
    return max(1, len(os.sched_getaffinity(0)) // sharing)


def work_in_threads(
    items: Iterable[Item],
    make_worker: Callable[[], Callable[[Item], None]],
    workers: int,
    halt: Callable[[], None] = lambda: None,
) -> None:
    """Hands items, in order, to that many threads; the first error stops all and is raised.

    ``make_worker`` is called once in each thread and gives the function that takes one item, so
    that a thread can have buffers of its own. Ctrl-C stops the threads after their current item.
    ``halt`` is called at an error, before the others are waited for: to end their own waiting.
    """
    queue, lock = iter(items), threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work = make_worker()
            while True:
                with lock:
                    if errors:
                        return
                    item = next(queue, None)
                if item is None:
                    return
                work(item)
        except BaseException as error:  # handed to the caller's thread below
            errors.append(error)
            halt()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors.insert(0, error)
        halt()
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]
