"""What a converter could reach that had nothing to do: two threads copy files past the page cache.

    python -m benchmarks.copying SOURCE TARGET

``cp`` keeps what it writes in the page cache, which can cost more than the disk where memory must
first be had (a virtual machine whose host takes back what is free). This copies as ``convert``
reads and writes, and does nothing in between.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv4_quant.synth_folder import write_all

PANEL = 2 << 20


def copy(source: Path, target: Path) -> None:
    """All files of a folder; on the disk when this returns."""
    target.mkdir()
    own = threading.local()

    def part(reading: int, writing: int, at: int, size: int) -> None:
        if not hasattr(own, "panel"):
            own.panel = memoryview(bytearray(PANEL))
        held = own.panel[: min(PANEL, size - at)]
        os.preadv(reading, [held], at)
        write_all(writing, held, at)

    with ThreadPoolExecutor(2) as pool:
        for path in sorted(source.iterdir()):
            size = path.stat().st_size
            with path.open("rb") as reading, (target / path.name).open("wb") as writing:
                if size:
                    os.posix_fallocate(writing.fileno(), 0, size)
                both = reading.fileno(), writing.fileno()
                list(
                    pool.map(
                        lambda at, both=both, n=size: part(*both, at, n), range(0, size, PANEL)
                    )
                )
                os.fdatasync(writing.fileno())


if __name__ == "__main__":
    copy(Path(sys.argv[1]), Path(sys.argv[2]))
