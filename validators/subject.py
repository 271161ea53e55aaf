"""What is judged: a folder, with whatever is wrong in it, and the weights that can still be read.

A judge must go on where a reader refuses: one damaged tensor is no reason to leave the others
unjudged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dsv4_quant.catalogue import Catalogue, TensorSpec, check_gpus, stored
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.folder import Folder
from dsv4_quant.checkpoint.matching import expected_entries
from dsv4_quant.checkpoint.reader import CONFIGS, inspect_folder
from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UsageError

Entries = dict[str, dict[str, tuple[str, tuple[int, ...]]]]
"""Per file: name -> (dtype, shape)."""


@dataclass(frozen=True)
class Subject:
    """A folder, and what its config makes of it; without a config nothing is expected of it."""

    root: Path
    folder: Folder
    config: ModelConfig | None
    catalogue: Catalogue | None
    """None also where the GPU count cannot be: then nobody can say what a rank must hold."""

    @classmethod
    def open(cls, path: str | Path) -> Subject:
        """Looks at names, config, index and headers. Raises UnreadableError if there are none."""
        root = Path(path)
        folder, config, catalogue = inspect_folder(root)
        if catalogue is not None:
            try:
                check_gpus(catalogue, folder.gpus)
            except UsageError:
                catalogue = None
        return cls(root, folder, config, catalogue)

    @property
    def config_file(self) -> str:
        """The config that was read, by its name in the folder."""
        return next((name for name in CONFIGS if (self.root / name).exists()), CONFIGS[0])

    @cached_property
    def expected(self) -> Entries:
        """Per file, what it must hold; files that could not be read are among them."""
        return {} if self.catalogue is None else expected_entries(self.catalogue, self.folder)

    @cached_property
    def where(self) -> dict[str, str]:
        """Tensor -> the file that holds it (hf): the one that the index says, if it does."""
        headers, index = self.folder.headers, self.folder.index
        found = {tensor: name for name, header in headers.items() for tensor in header.entries}
        found |= {
            tensor: name
            for tensor, name in index.items()
            if name in headers and tensor in headers[name].entries
        }
        return found

    @cached_property
    def sound(self) -> dict[str, TensorSpec]:
        """The weights whose every piece is there, in the right dtype and shape."""
        if self.catalogue is None:
            return {}
        broken = set(self._broken())
        return {
            name: spec
            for name, spec in self.catalogue.specs.items()
            if not any(tensor.name in broken for tensor in stored(spec, self.folder.layout))
        }

    def _broken(self) -> Iterator[str]:
        """Names of stored tensors that cannot be read as what they must be."""
        for file, tensors in self.expected.items():
            header = self.folder.headers.get(file)
            for name, want in tensors.items():
                entry = None if header is None else header.entries.get(name)
                if entry is None or (entry.dtype, entry.shape) != want:
                    yield name

    def checkpoint(self) -> Checkpoint | None:
        """A reader for the sound weights; None where nothing can be expected of the files."""
        if self.catalogue is None or self.config is None or not self.sound:
            return None
        index = self.where if self.folder.layout == "hf" else {}
        return Checkpoint(replace(self.folder, index=index), self.config, self.catalogue)
