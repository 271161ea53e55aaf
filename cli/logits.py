"""The file of ``dsv4-quant forward``, written while the pass hands out its logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dsv4_quant.checkpoint.header import build_header
from dsv4_quant.model import Observer
from dsv4_quant.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor


class LogitsFile(Observer):
    """Puts logits where they belong in a safetensors file, and tells a progress of every layer.

    A context manager. The file holds ``logits.i`` and, with the MTP block, ``mtp_logits.i`` of
    prompt i, ``[tokens, vocab_size]`` float32, and is what safetensors itself would write. Memory
    holds no more of it than what the pass hands out at once. OSError where it cannot be written.
    """

    def __init__(
        self, path: Path, lengths: Sequence[int], vocab_size: int, *, mtp: bool, progress: Progress
    ) -> None:
        kinds = ("logits", "mtp_logits")[: 1 + mtp]
        header, self._entries = build_header(
            (f"{kind}.{i}", "F32", (length, vocab_size))
            for kind in kinds
            for i, length in enumerate(lengths)
        )
        self._progress, self._row_bytes, self._data_start = progress, 4 * vocab_size, len(header)
        self._file = path.open("wb")
        self._file.write(header)

    def logits(self, prompt: int, first: int, rows: Tensor, *, mtp: bool) -> None:
        """Writes them down."""
        entry = self._entries[f"{'mtp_logits' if mtp else 'logits'}.{prompt}"]
        self._file.seek(self._data_start + entry.start + first * self._row_bytes)
        self._file.write(rows.numpy().data)

    def note(self, text: str) -> None:
        """Passed on."""
        self._progress.note(text)

    def read(self, count: int) -> None:
        """Passed on."""
        self._progress.read(count)

    def finished(self, done: int, total: int) -> None:
        """Steps come one by one."""
        if done == 1:
            self._progress.total(total)
        self._progress.advance(1)

    def __enter__(self) -> LogitsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
