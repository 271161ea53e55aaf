"""The journal of a streaming pass: its cuts, each recorded once the disk has what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from dsv4_quant.conversion.files import OutputFile
from dsv4_quant.conversion.moving import Mover
from dsv4_quant.conversion.notes import Cut, Notes
from dsv4_quant.conversion.plan import Plan, cuts
from dsv4_quant.conversion.results import Result

Wait = Callable[[Callable[[], bool]], bool]
"""Until something is so; whether it is, or the pass has failed before."""


class Keeper:
    """Keeps a journal while others write the files. ``results`` is of all weights done so far."""

    def __init__(
        self, plan: Plan, notes: Notes, results: Mapping[str, Result], mover: Mover | None
    ) -> None:
        self._plan, self._notes, self._results, self._mover = plan, notes, results, mover
        self._cuts = list(cuts(plan))

    def marks(self, file: int) -> Iterator[int]:
        """At which bytes of an output file there are cuts."""
        return (marks.get(file, 0) for _, marks in self._cuts)

    def keep(self, files: Sequence[OutputFile], first: int, wait: Wait) -> None:
        """Records every cut after the first so many steps, until the last or until all fails."""
        done = 0
        for steps, marks in self._cuts:
            if steps > first:
                if not wait(partial(_reached, files, marks)):
                    return
                for index in marks:
                    files[index].sync()
                self._record(self._cut(files, done, steps, marks))
            done = steps

    def _record(self, cut: Cut) -> None:
        """On the disk; then what only later steps need can go."""
        self._notes.record(cut)
        if self._plan.source.arrivals is not None:
            self._plan.source.arrivals.release(cut.steps)
        if self._mover is not None:
            self._mover.after_cut(cut)

    def _cut(
        self, files: Sequence[OutputFile], done: int, steps: int, marks: Mapping[int, int]
    ) -> Cut:
        written = {
            self._plan.files[index].name: (mark, files[index].marked[mark])
            for index, mark in marks.items()
        }
        some = self._plan.steps[done:steps]
        names = (step.spec.name for step in some if step.owned and not step.out.is_scale)
        return Cut(steps, written, {name: self._results[name].to_json() for name in names})


def _reached(files: Sequence[OutputFile], marks: Mapping[int, int]) -> bool:
    return all(files[index].hashed >= mark for index, mark in marks.items())
