"""Where the bits of a forward pass come from. Two machines of one class give the same bits.

Products and sums have a fixed order of IEEE operations, the same on every CPU (``model.dot``) and
on a GPU (``model.on_device``), which computes nothing else. What is left to PyTorch, on the CPU, is
``exp`` and its like, whose last bit depends on its version and on the vector unit that it found.
Measured: AVX2 and AVX-512 gave the same bits, the code for CPUs without either did not
(tests/fingerprints/thresholds.json). They count as different classes all the same; equal bits are
accepted whatever the class.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass

import torch

REVISION = 1
"""Of the arithmetic in ``model``: to be raised by a change that moves a bit."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A class of machines that give the same bits."""

    machine: str
    cpu: str
    torch: str
    revision: int

    @classmethod
    def here(cls) -> Machine:
        """The class of this machine."""
        return cls(
            machine=platform.machine(),
            cpu=torch.backends.cpu.get_cpu_capability(),
            torch=torch.__version__.split("+")[0],  # CPU kernels do not differ by build
            revision=REVISION,
        )

    def differences(self, other: Machine) -> list[str]:
        """What keeps two machines from being of one class, in words."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{key} {theirs[key]} there, {value} here"
            for key, value in mine.items()
            if value != theirs[key]
        ]
