"""What a forward pass read and who multiplied, in a line: so that a user sees what limits it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_quant.cli.tables import short, size

if TYPE_CHECKING:
    from dsv4_quant.model import Reading


def describe_reading(reading: Reading) -> str:
    """Such as ``read 8.1 GiB of 8.1 GiB needed in 212 s: 3 s waiting for the disk, which ...``."""
    return (
        f"read {size(reading.bytes_read)} of {size(reading.bytes_needed)} needed in"
        f" {short(reading.seconds)}: {short(reading.waited)} waiting for the disk, which gave"
        f" {size(reading.rate)}/s while it was asked{_with(reading.device)}"
    )


def _with(device: str) -> str:
    """Nothing of the processor: it takes part in every pass."""
    return "" if device == "cpu" else f"; products by {device}"
