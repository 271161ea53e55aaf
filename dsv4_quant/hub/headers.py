"""A checkpoint on the hub as a folder of true headers and holes.

Everything that headers and small files tell (what a checkpoint holds, how it would be converted,
whether its structure is sound) needs a few MB of a repository. They are put into a temporary
folder in which every weight file has its true size and its true header; its data are a hole that
takes no room. ``Arrivals`` brings the data themselves, where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dsv4_quant.errors import Dsv4Error, WriteError
from dsv4_quant.hub.arrivals import Arrivals
from dsv4_quant.hub.connection import Connection
from dsv4_quant.hub.ids import explain, parse_id
from dsv4_quant.hub.repository import (
    RemoteFile,
    Repository,
    ask_repository,
    header_end,
    wrong_hash,
)
from dsv4_quant.hub.source import Source
from dsv4_quant.progress import Progress

FIRST_BYTES = 256 << 10
"""What is asked of a weight file at first: all of most released shards' headers."""

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit; of a file that claims more, the reader will say what is wrong."""

UNHEARD = 3
"""How often nobody answers until the hub cannot be reached, and the cache must do."""

REQUESTS = 8
"""In flight at once: each waits for two round trips and little else."""


@contextmanager
def fetched(
    src: str | Path, progress: Progress, cache: Path | None, endpoint: str | None, pause: float
) -> Iterator[Source]:
    """``opened`` of an id."""
    name, revision = parse_id(src)
    progress.stage(f"reading the headers of {name}")
    repository = _ask(name, revision, endpoint, pause)
    held = _in_cache(name, revision, cache, repository)
    if held is not None:
        yield Source(held)
    elif repository is not None:  # without a hub the cache holds it, or that was an error
        with TemporaryDirectory(prefix="dsv4-quant-") as place:
            commit = repository.commit[:12]
            folder = Path(place, f"{name.replace('/', '--')}@{commit}")
            connection = Connection(repository, pause=pause)
            _lay_out(connection, folder)
            try:
                yield Source(folder, Arrivals(connection, folder))
            except Dsv4Error as error:  # the folder is gone when a user reads this
                error.rename(folder, f"{name}@{commit}")
                raise


def _ask(name: str, revision: str | None, endpoint: str | None, pause: float) -> Repository | None:
    """The repository, or None if there is no connection to the hub."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's own

    unheard = 0

    def ask() -> Repository | None:
        nonlocal unheard
        try:
            return ask_repository(name, revision, endpoint)
        except (HTTPError, OSError) as error:
            unheard += getattr(error, "response", None) is None
            if unheard < UNHEARD:
                raise
            return None
        except ValueError as error:
            explain(name, revision, error)

    if HF_HUB_OFFLINE:
        return None
    return Connection(Repository(name, revision, "", (), endpoint), pause=pause).patiently(ask)


def _in_cache(
    name: str, revision: str | None, cache: Path | None, known: Repository | None
) -> Path | None:
    """huggingface-hub's folder of a commit that is known, if it holds every file in full length.

    Of a commit that is not known, for want of a hub, the folder as it is. Raises UnreadableError
    where there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = revision if known is None else known.commit
    try:
        folder = Path(
            snapshot_download(name, revision=wanted, cache_dir=cache, local_files_only=True)
        )
    except LocalEntryNotFoundError as error:
        if known is None:
            explain(name, revision, error)
        return None
    except ValueError as error:
        explain(name, revision, error)
    for file in () if known is None else known.files:
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return None
    return folder


def _lay_out(connection: Connection, folder: Path) -> None:
    """Fetches all small files and all headers. Raises the first error."""

    def lay(file: RemoteFile) -> None:
        path = folder / file.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            (_lay_header if file.is_weights else _lay_small)(connection, file, path)
        except OSError as error:
            raise WriteError(
                f"The system refused: {error.strerror}",
                file=path,
                hint="Set TMPDIR to a folder that can hold the checkpoint's headers.",
            ) from None

    folder.mkdir(exist_ok=True)
    _in_parallel(lay, connection.repository.files, connection.halt)


def _in_parallel(
    work: Callable[[RemoteFile], None], files: Iterable[RemoteFile], halt: Callable[[], None]
) -> None:
    with ThreadPoolExecutor(REQUESTS) as pool:
        futures = [pool.submit(work, file) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException:
            halt()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _lay_small(connection: Connection, file: RemoteFile, path: Path) -> None:
    for _ in range(2):
        hasher = file.hasher()
        with path.open("wb") as out:
            for piece in connection.stream(file, 0, file.size):
                hasher.update(piece)
                out.write(piece)
        if hasher.hexdigest() == file.hash:
            return
    raise wrong_hash(connection.repository, file, hasher.hexdigest())


def _lay_header(connection: Connection, file: RemoteFile, path: Path) -> None:
    """The header is not checked here: whatever brings the data compares it with what passes."""
    with path.open("wb") as out:
        have = min(FIRST_BYTES, file.size)
        head = b"".join(connection.stream(file, 0, have))
        want = min(header_end(head), file.size)
        out.write(head[:want])
        if want <= MAX_HEADER_BYTES:
            for piece in connection.stream(file, min(have, want), want):
                out.write(piece)
        out.truncate(file.size)
