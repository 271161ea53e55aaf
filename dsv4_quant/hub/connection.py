"""Any range of a file of the hub, from its first byte to its last, whatever breaks on the way.

A connection that is cut is taken up at the byte where it broke. A busy hub (429, 503 and their
like) is asked again when it says, or after a pause that doubles. Only a hub that gives not one more
byte for many requests on end is given up. Each answer must be of the same commit, hash and size as
the first: a file that changes under a run is an error.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dsv4_quant.errors import SourceChangedError
from dsv4_quant.hub.ids import explain
from dsv4_quant.hub.repository import RemoteFile, Repository

FRUITLESS = 9
"""Requests on end without a new byte before the hub is given up: two minutes, if it says nothing
itself."""

MAX_PAUSE = 60.0
MAX_SAID_PAUSE = 900.0
"""Seconds; the second where the hub itself says how long to wait."""

AGAIN = (408, 429, 500, 502, 503, 504)

_DIGITS = re.compile(r"[0-9]{1,6}")
_RATE_LIMIT = re.compile(r";\s*r=0\s*;\s*t=([0-9]{1,6})")

Answer = TypeVar("Answer")


class Interrupted(Exception):
    """The run has ended while this waited; whoever ended it knows why."""


class Connection:
    """A repository's bytes. ``pause`` is the first wait after a failure, in seconds."""

    def __init__(self, repository: Repository, *, pause: float = 1.0) -> None:
        self.repository = repository
        self.pause = pause
        self._halted = threading.Event()

    def halt(self) -> None:
        """Makes every thread that waits or reads here raise Interrupted soon."""
        self._halted.set()

    def stream(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) in pieces. Raises what ``explain`` makes of a final refusal."""
        at, failed = start, 0
        while at < stop:
            error: Exception
            try:
                for piece in self._answer(file, at, stop):
                    at, failed = at + len(piece), 0
                    yield piece
                    self._check()
                error = OSError("the connection ended early")
            except retriable_errors() as caught:
                error = caught
            if at < stop:
                failed += 1
                self._wait_after(error, failed)

    def _answer(self, file: RemoteFile, at: int, stop: int) -> Iterator[bytes]:
        """The pieces of one answer, never more than was asked for."""
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        headers = {
            **build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={at}-{stop - 1}",
        }  # fmt: skip
        with get_session().stream(
            "GET", self.repository.url(file), headers=headers, follow_redirects=True,
            timeout=HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:  # fmt: skip
            hf_raise_for_status(response)
            self._check_answer(file, at, response)
            for piece in response.iter_raw():  # as it comes: what came before a break counts
                yield piece[: stop - at]
                at += len(piece)
                if at >= stop:
                    return

    def _check_answer(self, file: RemoteFile, at: int, response: Any) -> None:
        """Raises SourceChangedError unless this is the file that the listing told of."""
        said: dict[str, str] = {}
        for answer in (*response.history, response):
            said |= {key.lower(): value for key, value in answer.headers.items()}
        commit = said.get("x-repo-commit", self.repository.commit)
        etag = said.get("x-linked-etag", file.hash).removeprefix("W/").strip('"')
        whole = f"bytes {at}-"
        covers = said.get("content-range", "")
        is_part = covers.startswith(whole) and covers.endswith(f"/{file.size}")
        is_all = response.status_code == 200 and at == 0
        if is_all and "content-length" in response.headers:
            is_all = int(response.headers["content-length"]) == file.size
        if commit != self.repository.commit or etag != file.hash or not (is_part or is_all):
            raise SourceChangedError(
                f"The hub's file changed, or the hub sends other parts than it was asked for:"
                f" commit {commit}, hash {etag}, {covers or 'no range'}; expected commit"
                f" {self.repository.commit}, hash {file.hash}, {whole}.../{file.size}",
                file=f"{self.repository.name}/{file.name}",
                hint="Run the same command again; if it stays so, download the repository with"
                " `hf download` and give the folder.",
            )

    def patiently(self, ask: Callable[[], Answer]) -> Answer:
        """The answer to one request, asked again while the hub is busy."""
        failed = 0
        while True:
            try:
                return ask()
            except retriable_errors() as error:
                failed += 1
                self._wait_after(error, failed)

    def _wait_after(self, error: Exception, failed: int) -> None:
        """Pauses before another try, or raises what the error means."""
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", 0)
        if failed >= FRUITLESS or (response is not None and status not in AGAIN):
            explain(self.repository.name, self.repository.revision, error)
        self._halted.wait(said_pause(response) or min(MAX_PAUSE, self.pause * 2 ** (failed - 1)))
        self._check()

    def _check(self) -> None:
        if self._halted.is_set():
            raise Interrupted


def retriable_errors() -> tuple[type[Exception], ...]:
    """What a broken connection or a refusal raises; ``_wait_after`` tells which are final."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's own

    return HTTPError, OSError


def said_pause(response: Any) -> float:
    """Seconds that an answer asks to wait, 0 if it does not say.

    In Retry-After, or as the hub counts requests: ``RateLimit: "api";r=0;t=55``.
    """
    headers = {} if response is None else response.headers
    limit = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    said = headers.get("Retry-After", "").strip() or (limit[1] if limit else "")
    return min(float(said), MAX_SAID_PAUSE) if _DIGITS.fullmatch(said) else 0.0
