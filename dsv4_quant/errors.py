"""Every way in which a checkpoint, a request or a machine can be wrong has a name here.

Dsv4Error                     base: one clear paragraph; carries file and tensor where known
├── UsageError                the request cannot be done as asked (also: impossible GPU counts)
├── UnreadableError           the input is not a checkpoint that can be read
│   ├── HeaderError           a safetensors header breaks the format's rules
│   ├── IndexFileError        model.safetensors.index.json lies or cannot be read
│   ├── ConfigError           config.json misses a field, has an unknown one or an absurd value
│   ├── CatalogueError        names, shapes or formats differ from what the config implies
│   └── ManifestError         dsv4-manifest.json cannot be read or contradicts itself
├── NotANumberError           a weight holds NaN, or a scale byte is 0xFF
├── ValueNotExactError        a lossless conversion would change a value (names tensor and tile)
├── DiskSpaceError            the output does not fit on the disk
├── WriteError                the system refused a write: full disk, I/O error, vanished folder
├── SourceDamagedError        the source's own manifest, or another rank's copy, says otherwise
├── SourceChangedError        a source file vanished or changed while it was read
├── BusyError                 another run is writing to the same output folder
├── DeviceError               a GPU has failed, or has too little memory
│   └── MiscomputedError      it computes something else than the processor
└── TeamError                 one of several processes that share a job has ended, or never came

All of them end a command with exit code 2, and none with a traceback. Findings of a check are not
errors: they are values (``dsv4_quant.validators``) and end with exit code 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class Dsv4Error(Exception):
    """One paragraph for the user: what is wrong, where, and what to do about it.

    Args:
        what: what is wrong, as a sentence.
        file: the file that is at fault, if one is.
        tensor: the tensor at fault, if one is.
        hint: what the user can do, as a sentence.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.hint = hint
        super().__init__(self.paragraph())

    def rename(self, before: Path, after: str) -> None:
        """Of a file in the folder ``before``, says that it is in ``after``."""
        if self.file is not None and Path(self.file).is_relative_to(before):
            self.file = str(Path(after, Path(self.file).relative_to(before)))
            self.args = (self.paragraph(),)

    def paragraph(self) -> str:
        """The whole message: what, where, what to do. Strangers' names lose their control codes."""
        where = [f"file {self.file}"] if self.file else []
        where += [f"tensor {self.tensor}"] if self.tensor else []
        text = self.what if self.what.endswith((".", "?", "!")) else self.what + "."
        if where:
            text += f" ({', '.join(where)})"
        text = f"{text} {self.hint}" if self.hint else text
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UsageError(Dsv4Error):
    """The request cannot be done as asked."""


class UnreadableError(Dsv4Error):
    """The input is not a checkpoint that can be read."""


class HeaderError(UnreadableError):
    """A safetensors header breaks the format's rules."""


class IndexFileError(UnreadableError):
    """model.safetensors.index.json cannot be read or contradicts the shards."""


class ConfigError(UnreadableError):
    """config.json misses a field, has an unknown one, or holds an absurd value."""


class CatalogueError(UnreadableError):
    """The tensors on disk are not those that the config implies."""


class ManifestError(UnreadableError):
    """dsv4-manifest.json cannot be read or contradicts itself."""


class NotANumberError(Dsv4Error):
    """A weight holds NaN, or a scale that is none."""


class ValueNotExactError(Dsv4Error):
    """A lossless conversion would have changed a value."""


class DiskSpaceError(Dsv4Error):
    """The output does not fit on the disk."""


class WriteError(Dsv4Error):
    """The system refused to write."""


class SourceDamagedError(Dsv4Error):
    """The source is not what its own manifest says, or its ranks hold different copies."""


class SourceChangedError(Dsv4Error):
    """A source file vanished or changed while it was being read."""


class BusyError(Dsv4Error):
    """Another run is writing to the same output folder."""


class DeviceError(Dsv4Error):
    """A GPU has failed, or has too little memory; the work can continue."""


class MiscomputedError(DeviceError):
    """A GPU computes something else than the processor: nothing that it made is to be trusted."""


class TeamError(Dsv4Error):
    """One of several processes that share a job has ended, never came, or sees other files."""


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first names of a collection, sorted, and how many more there are."""
    ordered = sorted(names)
    text = ", ".join(ordered[:limit])
    more = len(ordered) - limit
    return f"{text} and {more} more" if more > 0 else text
