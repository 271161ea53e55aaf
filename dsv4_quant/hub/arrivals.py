"""A checkpoint's data that come while they are worked on.

``Checkpoint`` asks ``read_into`` for bytes instead of its folder's files, which are holes. Whoever
works on it in steps says what every step reads (``serving``) and how far it is for good
(``release``). In between the bytes come just in time, within a bound of disk space that is known
before (``room``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from dsv4_quant.hub.connection import Connection
from dsv4_quant.hub.notes import Notes
from dsv4_quant.hub.repository import header_end
from dsv4_quant.hub.schedule import Range, Reads, Visit, room, visits
from dsv4_quant.hub.window import Window

NOTES = "hub-notes"
"""The notes' name, beside the files that bytes land in."""


class Arrivals:
    """The weights of one commit. ``folder`` holds their headers."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        self._connection, self._folder = connection, folder
        self._files = connection.repository.weights
        self._window: Window | None = None

    @property
    def stamps(self) -> dict[str, list[int | str]]:
        """What tells that the files are the same as before: size and published hash, by name."""
        return {name: [file.size, file.hash] for name, file in self._files.items()}

    def room(self, reads: Reads, cuts: Iterable[int]) -> int:
        """The most disk space that the data take at any moment.

        ``cuts``: numbers of steps after which ``release`` will be called, the last that of all.
        """
        return room(self._visits(reads), cuts)

    def vouch(self, folder: Path, reads: Reads, done: int) -> bool:
        """Whether notes in ``folder`` show that the first ``done`` steps got checked bytes."""
        return Notes(folder / NOTES).vouch(self._visits(reads), done)

    def _visits(self, reads: Reads) -> Sequence[Visit]:
        return visits(reads, {name: file.size for name, file in self._files.items()})

    @contextmanager
    def serving(self, folder: Path, reads: Reads, cuts: Iterable[int], done: int) -> Iterator[None]:
        """Lets data arrive in ``folder`` for the steps from ``done`` on, while the block runs.

        When it ends in peace, every file has passed with the hash that the hub published. Files
        that an earlier, interrupted block left in the folder are made use of.
        """
        found, notes = self._visits(reads), Notes(folder / NOTES)
        headers = dict(map(self._header, self._files))
        if any(notes.digest(one) != digest for one, digest in headers.values()):
            notes.learn(dict(headers.values()))
        connection = Connection(self._connection.repository, pause=self._connection.pause)
        window = Window(
            connection, folder, {name: one for name, (one, _) in headers.items()},
            found, room(found, cuts), done, notes,
        )  # fmt: skip
        self._window = window
        try:
            yield
            window.confirm()
        finally:
            self._window = None
            window.close()

    def _header(self, name: str) -> tuple[str, tuple[Range, str]]:
        """A file's first bytes, which the plan was made of, and their hash."""
        with (self._folder / name).open("rb") as file:
            stop = min(header_end(file.read(8)), self._files[name].size)
            file.seek(0)
            return name, (Range(name, 0, stop), blake3(file.read(stop)).hexdigest())

    def read_into(self, file: str, offset: int, out: memoryview) -> None:
        """Fills a buffer; waits until the bytes are here and checked."""
        self._serving().read_into(file, offset, out)

    def release(self, done: int) -> None:
        """The first ``done`` steps are done for good: what only they needed may go."""
        self._serving().release(done)

    def halt(self) -> None:
        """The run ends because of an error elsewhere: nobody shall wait any longer."""
        if self._window is not None:
            self._window.halt()

    def _serving(self) -> Window:
        if self._window is None:
            raise RuntimeError("The headers of a checkpoint are here; nothing brings its data")
        return self._window
