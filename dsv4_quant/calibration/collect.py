"""One forward pass over some prompts, which writes down what every expert is given.

In exact arithmetic: equal weights and prompts leave equal files. Memory holds what a forward pass
holds; the inputs go to disk layer by layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv4_quant.calibration.inputs import PARTS, Calibration, Place, part_file, scratch_bytes
from dsv4_quant.errors import DiskSpaceError, NotANumberError, WriteError
from dsv4_quant.model import Observer, forward
from dsv4_quant.model.on_device import Device
from dsv4_quant.model.weights import Source
from dsv4_quant.progress import NoProgress, Progress


def collect(
    ckpt: Source,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    *,
    threads: int | None = None,
    device: Device = "auto",
    progress: Progress | None = None,
) -> Calibration:
    """Runs the pass, through the MTP block where its forward pass is known.

    Args:
        ckpt: the checkpoint that is to be rounded, as it is before.
        prompts: token ids; the more and the more varied, the more experts they reach.
        folder: exists and is empty; takes up to ``scratch_bytes``, and stays.
        threads: they change no bit.
        device: what computes the products, as in ``model.forward``; it changes no bit either.

    Raises:
        UsageError: empty prompts, or ids outside the vocabulary.
        NotANumberError: an expert is given NaN or infinity.
        DiskSpaceError, WriteError: the folder does not hold it.
    """
    config, tokens = ckpt.config, sum(map(len, prompts))
    needed, free = scratch_bytes(config, tokens), shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(
            f"What the experts are given for {tokens:,} tokens takes up to {needed:,} bytes,"
            f" the disk has {free:,} left",
            file=folder,
            hint="Make room, or calibrate with fewer prompts.",
        )
    mtp = config.num_mtp_blocks == 1 and not config.is_dspark
    try:
        with _Collector(folder, tokens, progress or NoProgress()) as collector:
            forward(
                ckpt, prompts,
                mtp=mtp, observer=collector, threads=threads, keep_logits=False, device=device,
            )  # fmt: skip
    except OSError as error:
        raise WriteError(f"Writing failed: {error.strerror}", file=folder) from error
    return Calibration(folder, ckpt.specs, collector.places, prompts)


class _Collector(Observer):
    """Writes the inputs of one layer after the other; an expert's tokens are put in their order."""

    def __init__(self, folder: Path, tokens: int, progress: Progress) -> None:
        self.places: dict[tuple[int, int], Place] = {}
        self._folder, self._progress, self._done = folder, progress, 0
        self._layer, self._start = -1, 0
        self._is_written = np.zeros(tokens, np.bool_)
        self._files = ExitStack()

    def expert_inputs(
        self, layer: int, expert: int, rows: Tensor, given: Tensor, hidden: Tensor
    ) -> None:
        if layer != self._layer:
            self._begin(layer)
        order = rows.argsort(stable=True)
        at: NDArray[np.int64] = rows[order].numpy()
        self._rows.write(at.astype(np.int32).data)
        self._hidden.write(_bf16(hidden[order], layer, expert).data)
        lines = _bf16(given[order], layer, expert)
        for row, line in zip(at.tolist(), lines, strict=True):
            if not self._is_written[row]:  # every expert of a token is given the same
                self._given.seek(row * line.nbytes)
                self._given.write(line.data)
        self._is_written[at] = True
        self.places[layer, expert] = Place(self._start, len(at))
        self._start += len(at)

    def note(self, text: str) -> None:
        """Tells the progress."""
        self._progress.note(text)

    def finished(self, done: int, total: int) -> None:
        """Tells the progress."""
        if not self._done:
            self._progress.stage("calibrating", "steps")
            self._progress.total(total)
        self._progress.advance(done - self._done)
        self._done = done

    def _begin(self, layer: int) -> None:
        self._files.close()
        self._rows, self._given, self._hidden = (
            self._files.enter_context(part_file(self._folder, layer, part).open("wb"))
            for part in PARTS
        )
        self._layer, self._start = layer, 0
        self._is_written[:] = False

    def __enter__(self) -> _Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def _bf16(values: Tensor, layer: int, expert: int) -> NDArray[np.int16]:
    """The nearest BF16 of ``[t, C]``, as bits."""
    if not bool(values.isfinite().all()):
        raise NotANumberError(f"Expert {expert} of layer {layer} is given NaN or infinity")
    bits: NDArray[np.int16] = values.bfloat16().view(torch.int16).numpy()
    return bits
