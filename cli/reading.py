"""What a forward pass read, in a line: so that a user sees what limits it, disk or processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_quant.cli.tables import duration, size

if TYPE_CHECKING:
    from dsv4_quant.model import Reading


def describe_reading(reading: Reading) -> str:
    """Such as ``read 8.1 GiB of 8.1 GiB needed in 212 s: 3 s waiting for the disk, which ...``."""
    return (
        f"read {size(reading.bytes_read)} of {size(reading.bytes_needed)} needed in"
        f" {_seconds(reading.seconds)}: {_seconds(reading.waited)} waiting for the disk, which gave"
        f" {size(reading.rate)}/s while it was asked"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else duration(seconds)
