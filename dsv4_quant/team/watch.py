"""Who of the processes is still alive.

A process on the same machine is seen to end at once, through a pidfd. One elsewhere is given up
when its heartbeat has not been heard for half a minute: the first process listens to all others,
and they to the first.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SILENCE = 30.0
"""Seconds without a heartbeat after which a process counts as lost."""

LEFT = b"left"
"""The last heartbeat of a process that is done."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a process runs."""

    host: str
    machine: str
    """The machine's boot; two containers on one machine share it."""
    processes: str
    """Its namespace of process ids."""
    pid: int
    cores: tuple[int, ...]

    @classmethod
    def here(cls) -> Member:
        """This process."""
        host, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id")
        machine, processes = host, ""
        with suppress(OSError):
            machine, processes = boot.read_text().strip(), str(Path("/proc/self/ns/pid").readlink())
        return cls(host, machine, processes, os.getpid(), tuple(sorted(os.sched_getaffinity(0))))

    def shares_cores(self, other: Member) -> bool:
        """Whether both may run on a core."""
        return self.machine == other.machine and not set(self.cores).isdisjoint(other.cores)

    def sees(self, other: Member) -> bool:
        """Whether the other's process id means something here."""
        return (self.machine, self.processes) == (other.machine, other.processes)


class Watch:
    """The other processes, as one of them sees them."""

    def __init__(self, rank: int, members: Mapping[int, Member]) -> None:
        self._others = [other for other in members if other != rank]
        self._local: dict[int, int] = {}
        """Descriptor -> process."""
        self._poll = select.poll()
        self._heard: dict[int, tuple[bytes, float]] = {}
        for other in self._others:
            if members[rank].sees(members[other]):
                self._follow(other, members[other].pid)

    def _follow(self, other: int, pid: int) -> None:
        try:
            fd = os.pidfd_open(pid)
        except OSError:  # it has ended already, or cannot be followed: its heartbeat tells
            return
        self._local[fd] = other
        self._poll.register(fd, select.POLLIN)

    def ended(self) -> list[int]:
        """Processes of this machine that have ended."""
        return [self._local[fd] for fd, _ in self._poll.poll(0)]

    def silent(self, beats: Mapping[int, bytes]) -> list[int]:
        """Processes anywhere whose heartbeat has been the same for too long."""
        now, found = time.monotonic(), []
        for other, beat in beats.items():
            last, since = self._heard.get(other, (b"", now))
            if beat != last:
                self._heard[other] = beat, now
            elif beat != LEFT and now - since > SILENCE:
                found.append(other)
        return found

    def close(self) -> None:
        """Follows nobody any more."""
        for fd in self._local:
            os.close(fd)
        self._local.clear()
