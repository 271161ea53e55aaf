"""A small hub on 127.0.0.1: the part of its HTTP interface that a download uses.

Files of one folder are served as a model repository. As the hub does, weights are answered with a
redirect and the SHA-256 as ETag, other files directly with the hash that git gives them; ranges
are honoured. Faults can be asked for: a connection cut in the middle, a busy server, false bytes,
and for every answer anew whatever ``Hub.trouble`` says.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee00" * 5


@dataclass
class Cut:
    """The connection breaks after so many bytes of the answer."""

    after: int


@dataclass
class Refuse:
    """The hub is busy; ``wait`` is what it says in Retry-After, if anything."""

    status: int
    wait: str | None = "0"
    header: str = "Retry-After"


@dataclass
class Send:
    """Other bytes than those of the file, as many as were asked for."""

    data: bytes


Trouble = Cut | Refuse | Send | None


@dataclass
class Hub:
    """What is served, what is to go wrong, and what was asked for."""

    root: Path
    repo: str = "someone/tiny"
    url: str = ""
    cdn: str = ""
    """Where weights are sent from: another host, as far as a client can tell."""
    cut: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which its connection is cut, once."""
    busy: dict[str, int] = field(default_factory=dict)
    """File -> status with which its first request is refused."""
    false_bytes: set[str] = field(default_factory=set)
    """Files of which other bytes are served than their hash says."""
    asked: Counter[str] = field(default_factory=Counter)
    """Files whose bytes were asked for, and how often."""
    ranges: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of every file that went out."""
    trouble: Callable[[str, int, int], Trouble] = lambda name, start, stop: None
    """Asked for every answer that holds bytes [start, stop) of a file."""
    commit: str = COMMIT
    etags: dict[str, str] = field(default_factory=dict)
    """Other hashes of files than the listing has."""
    lists: Callable[[dict[str, object]], dict[str, object]] = lambda entry: entry
    """What becomes of a file's entry in the listing."""
    pace: float = 0
    """Seconds for each MiB."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def paths(self) -> dict[str, Path]:
        return {
            path.relative_to(self.root).as_posix(): path
            for path in sorted(self.root.rglob("*"))
            if path.is_file()
        }

    def files(self) -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in self.paths().items()}


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def etag(path: Path) -> str:
    stat = path.stat()
    return _etag(path, stat.st_size, stat.st_mtime_ns)


@cache
def _etag(path: Path, size: int, _: int) -> str:
    data = path.read_bytes()
    if is_large(path.name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % size + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def route(self) -> None:
        path = urlsplit(self.path).path
        hub = self.hub
        api, web = f"/api/models/{hub.repo}", f"/{hub.repo}/resolve/"
        if path.startswith((f"{api}/revision/", f"{api}/tree/", web)):
            revision = path.removeprefix(web).removeprefix(f"{api}/").split("/")
            wanted = revision[0] if path.startswith(web) else revision[1]
            if wanted not in ("main", COMMIT, hub.commit):
                self.refuse(404, "RevisionNotFound")
            elif path.startswith(web):
                self.file("/".join(revision[1:]))
            elif revision[0] == "tree":
                self.answer([self.entry(name, path) for name, path in hub.paths().items()])
            else:
                blobs = "blobs" in parse_qs(urlsplit(self.path).query)
                self.info(blobs=blobs)
        elif path == api:
            self.info(blobs="blobs" in parse_qs(urlsplit(self.path).query))
        elif path.startswith("/cdn/"):
            self.data(unquote(path.removeprefix("/cdn/")))
        elif "/gated/" in path or path.endswith("/gated"):
            self.refuse(403, "GatedRepo")
        else:
            self.refuse(404, "RepoNotFound")

    def info(self, *, blobs: bool) -> None:
        siblings = [
            self.hub.lists(self.sibling(name, path)) if blobs else {"rfilename": name}
            for name, path in self.hub.paths().items()
        ]
        self.answer({"id": self.hub.repo, "modelId": self.hub.repo, "sha": self.hub.commit,
                     "private": False, "tags": [], "siblings": siblings})  # fmt: skip

    def sibling(self, name: str, path: Path) -> dict[str, object]:
        size, said = path.stat().st_size, etag(path)
        found: dict[str, object] = {"rfilename": name, "size": size, "blobId": said[:40]}
        if is_large(name):
            found["lfs"] = {"sha256": said, "size": size, "pointerSize": 134}
        return found

    def entry(self, name: str, path: Path) -> dict[str, object]:
        size, said = path.stat().st_size, etag(path)
        found: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": said[:40]}
        if is_large(name):
            found["lfs"] = {"oid": said, "size": size, "pointerSize": 134}
        return found

    def file(self, name: str) -> None:
        path = self.hub.paths().get(name)
        if path is None:
            self.refuse(404, "EntryNotFound")
            return
        said, size = self.hub.etags.get(name, etag(path)), str(path.stat().st_size)
        headers = {"X-Repo-Commit": self.hub.commit, "ETag": f'"{said}"'}
        if is_large(name):
            headers |= {
                "X-Linked-ETag": f'"{said}"', "X-Linked-Size": size,
                "Location": f"{self.hub.cdn}/cdn/{name}", "Content-Length": "0",
            }  # fmt: skip
            self.head(302, headers)
        elif self.command == "HEAD":
            self.head(200, {**headers, "Content-Length": size})
        else:
            self.data(name, headers)

    def data(self, name: str, headers: dict[str, str] | None = None) -> None:
        path = self.hub.paths()[name]
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        said = self.headers.get("Range")
        if said:
            self.hub.ranges.append(f"{name} {said}")
            first, _, last = said.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), int(last or stop - 1) + 1, 206
            headers = {**(headers or {}),
                       "Content-Range": f"bytes {start}-{stop - 1}/{size}"}  # fmt: skip
        trouble: Trouble = None
        if self.command == "GET":
            with self.hub.lock:
                self.hub.asked[name] += 1
            trouble = self.hub.trouble(name, start, stop)
            if once := self.hub.busy.pop(name, 0):
                trouble = Refuse(once)
        if isinstance(trouble, Refuse):
            self.refuse(trouble.status, "", trouble.wait, trouble.header)
            return
        body = trouble.data if isinstance(trouble, Send) else part_of(path, start, stop)
        if name in self.hub.false_bytes:
            body = bytes(len(body))
        self.head(status, {**(headers or {}), "Content-Length": str(len(body))})
        if self.command == "HEAD":
            return
        after = trouble.after if isinstance(trouble, Cut) else self.hub.cut.pop(name, None)
        self.send(name, body if after is None else body[:after])
        if after is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)

    def send(self, name: str, body: bytes) -> None:
        piece = 1 << 18
        for at in range(0, len(body), piece):
            self.wfile.write(body[at : at + piece])
            with self.hub.lock:
                self.hub.sent[name] += len(body[at : at + piece])
            if self.hub.pace:
                time.sleep(self.hub.pace * piece / (1 << 20))

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(
        self, status: int, code: str, wait: str | None = "0", header: str = "Retry-After"
    ) -> None:
        headers = {"X-Error-Code": code} if code else {}
        if wait is not None and not code:
            headers[header] = wait
        self.head(status, {**headers, "X-Error-Message": f"test: {code}", "Content-Length": "0"})


class Server(ThreadingHTTPServer):
    """Says nothing when a client goes away."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def part_of(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serves a folder until the block ends."""
    hub = Hub(root)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url, hub.cdn = (f"http://{h}:{server.server_port}" for h in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
