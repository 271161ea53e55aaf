"""What a shared job needs of its processes; here for the process that works alone.

All processes run the same program and come to the same verbs in the same order. An error in one of
them is raised in all: so each ends as a single process would, and only one of them tells the user.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dsv4_quant.progress import NoProgress, Progress

T = TypeVar("T")

SAME_PATHS = "Give all processes the same paths, on a filesystem that they share."


class Team:
    """The processes that share a job, seen by one of them. This one is alone."""

    rank = 0
    """Which process this is; the first leads."""
    size = 1
    local = 0
    """Which process of its machine this is: they share out its GPUs."""
    sharing = 1
    """How many of the processes run on the cores that this one may use."""

    @property
    def is_first(self) -> bool:
        """Whether this process leads."""
        return self.rank == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Every process does its part: the first gets all results by rank, the others nothing."""
        return [work()]

    def lead(self, work: Callable[[], T]) -> T:
        """The first process does it, and all get its result."""
        return work()

    def agree(self, look: Callable[[], str], what: str, *, hint: str = SAME_PATHS) -> None:
        """Raises TeamError, which names the process, where one sees something else."""

    def watched(self, progress: Progress | None) -> Progress:
        """A progress that also tells of the others' work, and raises when one of them has failed.

        Long work calls it all the time, from every thread: that is how it is stopped.
        """
        return progress or NoProgress()

    def fail(self, error: BaseException) -> BaseException:
        """This process cannot go on. Gives the error that all of them end with: the first."""
        return error

    def tell(self, say: Callable[[], None]) -> None:
        """Lets one process tell the user of a failure; in the others nothing happens."""
        say()

    def close(self) -> None:
        """This process is done with the others."""
