"""Running a command as a whole process: wall time, CPU time and peak memory, cold or warm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """What one process took; ``peak`` is its largest resident memory in bytes."""

    wall: float
    cpu: float
    peak: int


def run(command: Sequence[str], allowed: Collection[int] = (0,), **environment: str) -> Run:
    """Runs a command to its end. Raises CalledProcessError if it fails, and shows what it said.

    The peak is never below this process's own memory: Linux counts the moment before the new
    program takes over. So this process imports nothing large.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - began
    if process.returncode not in allowed:
        sys.stderr.buffer.write(output)
        raise subprocess.CalledProcessError(process.returncode, command)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def copy(source: Path, target: Path) -> Run:
    """``cp`` and a sync of what it wrote: the yardstick."""
    script = 'cp -r "$1" "$2" && sync "$2"/* "$2"'
    return run(["sh", "-c", script, "sh", str(source), str(target)])


def dsv4(*arguments: str, allowed: Collection[int] = (0,)) -> Run:
    """One dsv4-quant command."""
    return run([sys.executable, "-m", "dsv4_quant", *arguments], allowed)


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove(folder: Path) -> None:
    """A folder and all in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache, so that the next read is cold."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def warm(folder: Path) -> None:
    """Reads a folder's files once, so that the next read comes from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 22):
                    pass


def machine() -> dict[str, str]:
    """What the figures were measured on; no names of hosts or folders."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
    }
