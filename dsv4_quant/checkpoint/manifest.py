"""dsv4-manifest.json and SHA256SUMS: what a checkpoint's files and values must be.

Written in the same pass as the data, last of all files. There is no date and no path in it, so the
same conversion makes the same bytes. SHA256SUMS covers every other file, the manifest included,
in the form that ``sha256sum -c`` reads; or B3SUMS does, in that of ``b3sum -c`` (``sums``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv4_quant import strict_json
from dsv4_quant.checkpoint.digest import model_digest
from dsv4_quant.checkpoint.requantised import Requantised
from dsv4_quant.checkpoint.sums import LISTS, HashKind
from dsv4_quant.errors import ManifestError

MANIFEST = "dsv4-manifest.json"
SUMS = LISTS["sha256"]
VERSION = 1
MAX_BYTES = 64 << 20
"""V4-Pro's is 12 MB."""
MAX_VALUES = 2_000_000

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the checkpoint: its length and one hash of it."""

    bytes: int
    sha256: str | None = None
    blake3: str | None = None

    @classmethod
    def of(cls, size: int, kind: HashKind, hash: str) -> FileRecord:
        """The record of a file that has this hash of that kind."""
        return cls(size, sha256=hash) if kind == "sha256" else cls(size, blake3=hash)

    @property
    def kind(self) -> HashKind:
        """Which hash it is."""
        return "blake3" if self.sha256 is None else "sha256"

    @property
    def hash(self) -> str:
        """The hash, in hex."""
        found = self.blake3 if self.sha256 is None else self.sha256
        assert found is not None
        return found

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {"bytes": self.bytes, self.kind: self.hash}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One logical weight: how it is stored, and the digest of its values.

    ``source`` is the digest of the values that it was made of, where they are not the same.
    """

    format: str
    digest: str
    source: str | None = None

    @property
    def made_of(self) -> str:
        """Digest of the values that the weight was made of."""
        return self.source or self.digest


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the exact casts of a conversion proved, per operation.

    ``tiles`` were all found exact; ``spreads[s]`` of them had scale exponents s apart (blocks of
    zeros not counted); ``worst`` names the first tile with the largest spread.
    """

    tiles: int = 0
    tensors: int = 0
    spreads: dict[int, int] = field(default_factory=dict)
    worst: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole file, as an object."""

    tool: str
    layout: str
    gpus: int
    formats: Mapping[str, str]
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    source: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    certificate: Mapping[str, Certificate] = field(default_factory=dict)
    requantised: Requantised | None = None

    @property
    def hash_kind(self) -> HashKind:
        """Which hash the files have, all the same."""
        return next((record.kind for record in self.files.values()), "sha256")

    @property
    def value_digest(self) -> str:
        """The whole model's value digest."""
        return model_digest({name: record.digest for name, record in self.tensors.items()})

    @property
    def source_digest(self) -> str:
        """The value digest of what the model was made of: another one only where it was rounded."""
        return model_digest({name: record.made_of for name, record in self.tensors.items()})

    def to_json(self) -> bytes:
        """The file's bytes: readable, stable, one line per file and per tensor."""
        head = {
            "version": VERSION,
            "tool": self.tool,
            "value_digest": self.value_digest,
            "layout": self.layout,
            "gpus": self.gpus,
            "formats": dict(self.formats),
            "source": dict(self.source),
            "options": dict(self.options),
            "certificate": {op: asdict(proof) for op, proof in self.certificate.items()},
        }
        text = json.dumps(head, indent=2)[:-2]
        if self.requantised is not None:
            text += ',\n  "requantised": ' + self.requantised.to_json()
        text += ',\n  "files": ' + _lines({n: r.to_json() for n, r in sorted(self.files.items())})
        tensors = {n: _record(r) for n, r in sorted(self.tensors.items())}
        text += ',\n  "tensors": ' + _lines(tensors)
        return (text + "\n}\n").encode()


def _record(record: TensorRecord) -> dict[str, Any]:
    held = {"format": record.format, "digest": record.digest}
    return held if record.source is None else held | {"source": record.source}


def _lines(table: Mapping[str, Any]) -> str:
    rows = (f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    return "{\n" + ",\n".join(rows) + "\n  }"


def sums(files: Mapping[str, FileRecord]) -> bytes:
    """SHA256SUMS, or whichever list has that kind of hash, for these files."""
    return "".join(f"{record.hash}  {name}\n" for name, record in sorted(files.items())).encode()


def read_manifest(path: Path) -> Manifest:
    """Raises ManifestError when it cannot be read, or breaks its own rules."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ManifestError("The manifest is larger than 64 MiB", file=path)
        return _parse(strict_json.parse(path.read_bytes(), max_values=MAX_VALUES))
    except OSError as error:
        raise ManifestError(f"The manifest cannot be read: {error.strerror}", file=path) from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ManifestError(
            f"The manifest is not one that this tool writes: {error!r}"[:300],
            file=path,
            hint="Make a new one with `dsv4-quant manifest`, if you trust the files.",
        ) from None


def _parse(raw: Any) -> Manifest:
    if raw["version"] != VERSION:
        raise ValueError(f"version {raw['version']!r}, this tool reads {VERSION}")
    files = {name: FileRecord(**record) for name, record in raw["files"].items()}
    for name, file_record in files.items():
        if not _is_plain(name) or type(file_record.bytes) is not int:
            raise ValueError(f"file entry {name!r}")
        if (file_record.sha256 is None) == (file_record.blake3 is None):
            raise ValueError(f"hash of {name!r}")
        if not _HEX.fullmatch(file_record.hash):
            raise ValueError(f"{file_record.kind} of {name!r}")
    if len({record.kind for record in files.values()}) > 1:
        raise ValueError("hashes of different kinds")
    tensors = {name: TensorRecord(**record) for name, record in raw["tensors"].items()}
    for name, record in tensors.items():
        hashes = (record.digest, record.made_of)
        if not all(map(_HEX.fullmatch, hashes)) or not isinstance(record.format, str):
            raise ValueError(f"digest of {name!r}")
    manifest = Manifest(
        tool=str(raw["tool"]),
        layout=str(raw["layout"]),
        gpus=int(raw["gpus"]),
        formats=dict(raw["formats"]),
        files=files,
        tensors=tensors,
        source=dict(raw["source"]),
        options=dict(raw["options"]),
        certificate={
            op: Certificate(
                proof["tiles"],
                proof["tensors"],
                {int(spread): count for spread, count in proof["spreads"].items()},
                proof["worst"],
            )
            for op, proof in raw["certificate"].items()
        },
        requantised=Requantised.from_json(raw["requantised"]) if "requantised" in raw else None,
    )
    if raw["value_digest"] != manifest.value_digest:
        raise ValueError("value_digest is not that of its own tensors")
    return manifest


def _is_plain(name: str) -> bool:
    """A path inside the folder: no way up, not absolute."""
    parts = name.split("/")
    return (
        bool(name) and name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)
    )
