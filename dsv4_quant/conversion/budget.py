"""How much memory a conversion may use, and what follows: panel size and threads.

Measured: Python with numpy, numba, its kernels and BLAKE3 takes 150 MiB; a weight takes 3.5 to 5.2
KiB until the manifest is written (its headers, plan, digest and proof). What remains is shared by
panels: each thread holds one panel's source and output and the hashing buffers; as much again may
wait to be hashed in order. A panel has at least one digest leaf and one row of blocks, so very wide
weights need more than LEAST_VALUES.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_quant.checkpoint.panels import PANEL_VALUES, row_unit, usable_cores
from dsv4_quant.conversion.device import Device
from dsv4_quant.conversion.plan import Plan, Step
from dsv4_quant.errors import UsageError

BASE_BYTES = 160 << 20
TEAM_BYTES = 224 << 20
"""PyTorch, by which processes of a team reach each other; measured: 180 MiB."""
WEIGHT_BYTES = 6 << 10
VALUE_BYTES = 16
"""Per thread and panel value: 4 source, 4 output, 8 waiting to be hashed."""

DEVICE_BYTES = 1 << 30
"""PyTorch, CUDA and what they keep of it in this process: an allowance, not a measurement."""
DEVICE_VALUE_BYTES = 16
"""Per thread and panel value: pinned memory for the way in and back, up to 4 each, and as much for
the smaller ones that they grew out of."""

LEAST_VALUES = 1 << 19


@dataclass(frozen=True, slots=True)
class Budget:
    """Threads, values per panel, and the peak memory that they imply."""

    workers: int
    panel_values: int
    peak_bytes: int


def budget(
    plan: Plan,
    *,
    workers: int | None,
    max_memory: int,
    sharing: int | None = None,
    device: Device = "cpu",
) -> Budget:
    """Shares out the memory. Raises UsageError that names the least that would do.

    ``sharing``: how many processes of a team run on these cores; None for a process alone. Beside
    another ``device`` there is one thread more: while one waits for it, the others keep the cores.
    """
    is_gpu = device != "cpu"
    threads = workers or usable_cores(sharing or 1) + is_gpu
    per_value = VALUE_BYTES + DEVICE_VALUE_BYTES * is_gpu
    weights = (step for step in plan.steps if not step.out.is_scale)
    fixed = BASE_BYTES + WEIGHT_BYTES * len(plan.catalogue.specs)
    if is_gpu:
        fixed += DEVICE_BYTES  # PyTorch is in it
    elif sharing is not None:
        fixed += TEAM_BYTES
    narrowest = max(LEAST_VALUES, max(map(_least_values, weights)))
    least = fixed + narrowest * per_value
    if max_memory < least:
        raise UsageError(
            f"--max-memory {max_memory >> 20} MiB is too little for this checkpoint",
            hint=f"It needs at least {-(-least >> 20)} MiB.",
        )
    threads = min(threads, (max_memory - fixed) // (narrowest * per_value))
    values = (max_memory - fixed) // (threads * per_value)
    values = min(values, max(PANEL_VALUES, narrowest))
    return Budget(threads, values, fixed + threads * values * per_value)


def _least_values(step: Step) -> int:
    unit = row_unit(step.spec, (step.out.spec.format,))
    return min(unit, step.spec.matrix[0]) * step.spec.matrix[1]
