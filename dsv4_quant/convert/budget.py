"""How much memory a conversion may use, and what follows: panel size and threads.

Measured: Python with numpy, numba and BLAKE3 takes about 200 MiB, a weight's entry in the plan
about 2 KiB. What remains is shared by panels: each thread holds one panel's source and output and
the hashing buffers; as much again may wait to be hashed in order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dsv4_quant.checkpoint.panels import PANEL_VALUES
from dsv4_quant.convert.plan import Plan
from dsv4_quant.errors import UsageError

BASE_BYTES = 160 << 20
WEIGHT_BYTES = 2 << 10
VALUE_BYTES = 16
"""Per thread and panel value: 4 source, 4 output, 8 waiting to be hashed."""

LEAST_VALUES = 1 << 19


@dataclass(frozen=True, slots=True)
class Budget:
    """Threads, values per panel, and the peak memory that they imply."""

    workers: int
    panel_values: int
    peak_bytes: int


def budget(plan: Plan, *, workers: int | None, max_memory: int) -> Budget:
    """Shares out the memory. Raises UsageError that names the least that would do."""
    threads = workers or len(os.sched_getaffinity(0))
    fixed = BASE_BYTES + WEIGHT_BYTES * len(plan.catalogue.specs)
    least = fixed + LEAST_VALUES * VALUE_BYTES
    if max_memory < least:
        raise UsageError(
            f"--max-memory {max_memory >> 20} MiB is too little for this checkpoint",
            hint=f"It needs at least {-(-least >> 20)} MiB.",
        )
    threads = min(threads, (max_memory - fixed) // (LEAST_VALUES * VALUE_BYTES))
    values = min(PANEL_VALUES, (max_memory - fixed) // (threads * VALUE_BYTES))
    return Budget(threads, values, fixed + threads * values * VALUE_BYTES)
