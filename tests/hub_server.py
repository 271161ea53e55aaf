"""A small hub on 127.0.0.1: the part of its HTTP interface that a download uses.

Files of one folder are served as a model repository. As the hub does, weights are answered with a
redirect and the SHA-256 as ETag, other files directly with the hash that git gives them; ranges
are honoured. Faults can be asked for: a connection cut in the middle, a busy server, false bytes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "c0ffee00" * 5


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

    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.is_file()
        }


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def etag(name: str, data: bytes) -> str:
    if is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


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
            if wanted not in ("main", COMMIT):
                self.refuse(404, "RevisionNotFound")
            elif path.startswith(web):
                self.file("/".join(revision[1:]))
            elif revision[0] == "tree":
                self.answer([self.entry(name, data) for name, data in hub.files().items()])
            else:
                siblings = [{"rfilename": name} for name in hub.files()]
                self.answer({"id": hub.repo, "modelId": hub.repo, "sha": COMMIT, "private": False,
                             "downloads": 0, "tags": [], "siblings": siblings})  # fmt: skip
        elif path.startswith("/cdn/"):
            self.data(path.removeprefix("/cdn/"))
        elif "/gated/" in path or path.endswith("/gated"):
            self.refuse(403, "GatedRepo")
        else:
            self.refuse(404, "RepoNotFound")

    def entry(self, name: str, data: bytes) -> dict[str, object]:
        found: dict[str, object] = {
            "type": "file", "path": name, "size": len(data), "oid": "0" * 40,
        }  # fmt: skip
        if is_large(name):
            found["lfs"] = {"oid": etag(name, data), "size": len(data), "pointerSize": 134}
        else:
            found["oid"] = etag(name, data)
        return found

    def file(self, name: str) -> None:
        data = self.hub.files().get(name)
        if data is None:
            self.refuse(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(name, data)}"'}
        if is_large(name):
            headers |= {
                "X-Linked-ETag": f'"{etag(name, data)}"', "X-Linked-Size": str(len(data)),
                "Location": f"{self.hub.cdn}/cdn/{name}", "Content-Length": "0",
            }  # fmt: skip
            self.head(302, headers)
        elif self.command == "HEAD":
            self.head(200, {**headers, "Content-Length": str(len(data))})
        else:
            self.data(name, headers)

    def data(self, name: str, headers: dict[str, str] | None = None) -> None:
        data = self.hub.files()[name]
        if name in self.hub.false_bytes:
            data = bytes(len(data))
        if self.command == "GET":
            self.hub.asked[name] += 1
            if status := self.hub.busy.pop(name, 0):
                self.refuse(status, "")
                return
        start, status = 0, 200
        said = self.headers.get("Range")
        if said:
            self.hub.ranges.append(f"{name} {said}")
            start, status = int(said.removeprefix("bytes=").split("-")[0]), 206
            headers = {**(headers or {}),
                       "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}  # fmt: skip
        body = data[start:]
        self.head(status, {**(headers or {}), "Content-Length": str(len(body))})
        if self.command == "HEAD":
            return
        stop = self.hub.cut.pop(name, None)
        self.wfile.write(body if stop is None else body[:stop])
        if stop is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)

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

    def refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code} if code else {"Retry-After": "0"}
        self.head(status, {**headers, "X-Error-Message": f"test: {code}", "Content-Length": "0"})


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serves a folder until the block ends."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url, hub.cdn = (f"http://{h}:{server.server_port}" for h in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
