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

from dsv4_quant.errors import WriteError
from dsv4_quant.hub.arrivals import Arrivals
from dsv4_quant.hub.connection import Connection
from dsv4_quant.hub.download import resolve
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

REQUESTS = 8
"""In flight at once: each waits for two round trips and little else."""


@contextmanager
def fetched(
    src: str | Path, progress: Progress, cache: Path | None, endpoint: str | None, pause: float
) -> Iterator[Source]:
    """``opened`` of an id."""
    repository = _ask(*parse_id(src), endpoint, pause)
    held = None if repository is None else _in_cache(repository, cache)
    if repository is None or held is not None:
        yield Source(held or resolve(src, progress=progress, cache=cache))
        return
    with TemporaryDirectory(prefix="dsv4-quant-") as place:
        folder = Path(place, f"{repository.name.replace('/', '--')}@{repository.commit[:12]}")
        progress.stage(f"reading the headers of {repository.name}")
        connection = Connection(repository, pause=pause)
        _lay_out(connection, folder)
        yield Source(folder, Arrivals(connection, folder))


def _ask(name: str, revision: str | None, endpoint: str | None, pause: float) -> Repository | None:
    """The repository, or None if there is no connection to the hub."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's own

    def ask() -> Repository | None:
        try:
            return ask_repository(name, revision, endpoint)
        except (HTTPError, OSError) as error:
            if getattr(error, "response", None) is None:
                return None
            raise
        except ValueError as error:
            explain(name, revision, error)

    if HF_HUB_OFFLINE:
        return None
    return Connection(Repository(name, revision, "", (), endpoint), pause=pause).patiently(ask)


def _in_cache(repository: Repository, cache: Path | None) -> Path | None:
    """The cache's folder of this commit, if it holds every file in its full length."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repository.name, revision=repository.commit, cache_dir=cache, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None
    for file in repository.files:
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
