"""One commit of a repository: the files that a checkpoint needs, their sizes and their hashes.

The hub keeps large files outside git and publishes their SHA-256; of the others it publishes git's
own hash, SHA-1 over ``blob SIZE\\0`` and the content. Every byte that is taken from the hub is
checked against one of the two.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from dsv4_quant.errors import SourceDamagedError, UnreadableError
from dsv4_quant.hub.ids import UNWANTED, WANTED
from dsv4_quant.strict_json import shown

MAX_BYTES = 1 << 50
MAX_SMALL_BYTES = 1 << 30
"""A file of a petabyte, or a gigabyte beside the weights, is a lie or no checkpoint."""

_HEX = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of one commit. ``hash`` is SHA-256 (64 digits) or git's (40)."""

    name: str
    size: int
    hash: str

    @property
    def is_weights(self) -> bool:
        """Whether its bytes are fetched when they are needed, not at once."""
        return self.name.endswith(".safetensors")

    def hasher(self) -> Any:
        """A hash object whose hexdigest over the whole content must be ``hash``."""
        if len(self.hash) == hashlib.sha256().digest_size * 2:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit; ``endpoint`` is the hub's address if not the usual one."""

    name: str
    revision: str | None
    commit: str
    files: tuple[RemoteFile, ...]
    endpoint: str | None = None

    @property
    def weights(self) -> dict[str, RemoteFile]:
        """The weight files by name."""
        return {file.name: file for file in self.files if file.is_weights}

    def url(self, file: RemoteFile) -> str:
        """Where the hub says from where a file's bytes can be had."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, file.name, revision=self.commit, endpoint=self.endpoint)


def ask_repository(name: str, revision: str | None, endpoint: str | None = None) -> Repository:
    """Asks the hub. Raises huggingface-hub's errors, and UnreadableError at a useless answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    info = HfApi(endpoint=endpoint).model_info(
        name, revision=revision, files_metadata=True, timeout=HF_HUB_ETAG_TIMEOUT
    )
    wanted = filter_repo_objects(
        info.siblings or [], allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED),
        key=lambda sibling: sibling.rfilename,
    )  # fmt: skip
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise UnreadableError(f"The hub does not say which commit of {name} is meant")
    bare = Repository(name, revision, str(info.sha), (), endpoint)
    files = tuple(sorted((_file(bare, sibling) for sibling in wanted), key=lambda f: f.name))
    if sum(file.size for file in files if not file.is_weights) > MAX_SMALL_BYTES:
        raise UnreadableError(f"The files of {name} beside the weights are larger than 1 GiB")
    return Repository(name, revision, bare.commit, files, endpoint)


def _file(repository: Repository, sibling: Any) -> RemoteFile:
    """Raises UnreadableError at a name that leads elsewhere, or where size or hash is missing."""
    name, size = sibling.rfilename, sibling.size
    found = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise UnreadableError(f"The hub lists a file that cannot be: {shown(name)}")
    if size is None or not found or (name.endswith(".safetensors") and not sibling.lfs):
        size, found = _said_by_itself(repository, RemoteFile(name, 0, ""))
    if type(size) is not int or not 0 <= size <= MAX_BYTES or not _HEX.fullmatch(found or ""):
        raise UnreadableError(
            f"The hub publishes no size and hash of {name}, so nothing could check its bytes",
            hint="Download the repository with `hf download` and give the folder.",
        )
    return RemoteFile(name, size, found)


def _said_by_itself(repository: Repository, file: RemoteFile) -> tuple[int | None, str]:
    """Size and hash as the answer to a request for the file itself names them.

    A listing may lack what is kept outside git; the blob's hash is then that of a pointer.
    """
    from huggingface_hub import get_hf_file_metadata

    found = get_hf_file_metadata(repository.url(file), endpoint=repository.endpoint)
    return found.size, found.etag or ""


def header_end(head: bytes) -> int:
    """Where a file's data start, by its first eight bytes."""
    return 8 + int.from_bytes(head[:8], "little")


def wrong_hash(repository: Repository, file: RemoteFile, found: str) -> SourceDamagedError:
    """What a file is that twice did not have the hash that the hub published."""
    return SourceDamagedError(
        f"Twice the hub sent bytes that do not have the hash that it published: expected"
        f" {file.hash}, found {found}",
        file=f"{repository.name}/{file.name}",
        hint="Nothing was made of them. A proxy or a mirror on the way may be damaged; run the same"
        " command again later.",
    )
