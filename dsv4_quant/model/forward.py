"""forward: the logits of a checkpoint for some prompts, a layer at a time.

All prompts go through a layer before the next is read, so every weight is read once, and what
memory holds is one layer's dense weights, one or two experts, and the prompts' streams. While a
layer's experts are computed, those that follow and the next layer's dense weights are read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UsageError
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.batch import Batch
from dsv4_quant.model.block import Setting, run_block
from dsv4_quant.model.head import embed, head_input, head_panels, logits
from dsv4_quant.model.mtp import check_mtp, mtp_streams
from dsv4_quant.model.observer import Observer
from dsv4_quant.model.on_device import Device, products_on
from dsv4_quant.model.reading import Reading, needed_bytes
from dsv4_quant.model.rope import Rope
from dsv4_quant.model.streams import expand
from dsv4_quant.model.weights import Reader, Source, Wanted, Weights


@dataclass(frozen=True)
class Result:
    """What a forward pass found."""

    logits: list[Tensor]
    """Per prompt ``[positions, vocab_size]`` float32; none if they were not to be kept."""
    mtp_logits: list[Tensor] | None
    """The same of the MTP block, if it was asked for."""
    experts_hit: list[list[int]]
    """Per layer (the MTP block last), the experts that any token went to, ascending."""
    reading: Reading
    """Bytes and seconds."""


def forward(
    ckpt: Source,
    prompts: Sequence[Sequence[int]],
    *,
    arithmetic: Literal["exact", "deployed"] = "exact",
    activations: Literal["float32", "bfloat16"] = "float32",
    decode: int = 0,
    mtp: bool = False,
    observer: Observer | None = None,
    threads: int | None = None,
    keep_logits: bool = True,
    device: Device = "auto",
    local: int = 0,
) -> Result:
    """The reference forward pass.

    Args:
        ckpt: an open checkpoint, of either layout and any format.
        prompts: token ids; prompts do not see each other.
        arithmetic: see ``model.arithmetic``.
        activations: what stored results can hold.
        decode: the last positions of every prompt that are computed one at a time, as a server
            decodes; the others are one prefill.
        mtp: also compute the MTP block.
        observer: is told what happens in every layer, and the logits.
        threads: for products; PyTorch's own number if not given. They change no bit.
        keep_logits: if not, only the observer sees them, and they take no more memory than the
            head does. All logits of 2,050 positions of V4-Flash are as large as its head, 1 GiB.
        device: what computes the products (``on_device``): cpu, the processor; cuda, a GPU; auto, a
            GPU where there is one that passes its test. It changes no bit.
        local: which process of its machine this is: each takes a GPU of its own.

    Returns:
        logits of every position of every prompt.

    Raises:
        UsageError: empty prompts, ids outside the vocabulary, an MTP block that is not there, or
            cuda where there is no GPU.
        DeviceError: the GPU fails; MiscomputedError: it computes something else.
    """
    began = time.monotonic()
    config = ckpt.config
    _check(config, prompts, arithmetic, activations, decode, threads, device)
    if mtp:
        check_mtp(config)
    observer = observer or Observer()
    multiplying = products_on(device, threads, local=local, refused=observer.note)
    with multiplying as products, one_torch_thread(), Reader(ckpt) as reader:
        a = Arithmetic(arithmetic == "deployed", activations == "bfloat16", products)
        batch = Batch([list(prompt) for prompt in prompts], decode)
        length = max(batch.lengths)
        set_ = Setting(
            config, batch, a,
            Rope(config, compressed=False, length=length),
            Rope(config, compressed=True, length=length),
            observer,
        )  # fmt: skip
        run = _Pass(reader, set_, mtp)
        inputs, hit = run.blocks()
        kept = run.heads(inputs, keep=keep_logits)
    needed = needed_bytes(ckpt.specs, set(batch.tokens.tolist()), hit)
    reading = reader.meter.summary(needed, time.monotonic() - began, products.device)
    return Result(kept[0], kept[1] if mtp else None, hit, reading)


@dataclass(frozen=True)
class _Pass:
    """One forward pass under way."""

    reader: Reader
    set_: Setting
    mtp: bool

    def blocks(self) -> tuple[list[Tensor], list[list[int]]]:
        """All layers and the MTP block: inputs of the heads ``[t, d]``, and the experts hit."""
        config, batch, a = self.set_.config, self.set_.batch, self.set_.arithmetic
        layers = config.num_hidden_layers
        wanted = _in_turn(self.reader.source, layers + self.mtp)
        self.reader.announce(wanted[0])
        embedded = embed(batch.tokens, self.reader)  # [t, d]
        h = expand(embedded, config.hc_mult)  # [t, s, d]
        hit = []
        for layer in range(layers):
            weights = Weights(self.reader, f"layers.{layer}.")
            hit.append(run_block(h, layer, weights, wanted[layer + 1], self.set_).hit())
            self._finished(layer + 1)
        inputs = [head_input(h, Weights(self.reader), config, a)]
        if self.mtp:
            weights = Weights(self.reader, "mtp.0.")
            h = mtp_streams(h, embedded, weights, config, a)
            hit.append(run_block(h, layers, weights, wanted[layers + 1], self.set_).hit())
            inputs.append(head_input(h, weights, config, a))
            self._finished(layers + 1)
        return inputs, hit

    def heads(self, inputs: list[Tensor], *, keep: bool) -> list[list[Tensor]]:
        """Shows the observer all logits; per head and prompt those that are kept."""
        batch, observer = self.set_.batch, self.set_.observer
        kept: list[list[Tensor]] = [[] for _ in inputs]
        for first, found in logits(
            inputs, self.reader, self.set_.config, self.set_.arithmetic, at_once=keep
        ):
            for head, rows in enumerate(found):
                for prompt, position, some in batch.parts(first, len(rows)):
                    observer.logits(prompt, position, rows[some], mtp=bool(head))
                    if keep:
                        kept[head].append(rows[some])
        self._finished(self.set_.config.num_hidden_layers + len(inputs))
        return kept

    def _finished(self, step: int) -> None:
        self.set_.observer.read(self.reader.meter.bytes)
        self.set_.observer.finished(step, self.set_.config.num_hidden_layers + 1 + self.mtp)


def _in_turn(ckpt: Source, blocks: int) -> list[list[Wanted]]:
    """Per block the tensors that every token needs, and last what the heads need."""
    found: list[list[Wanted]] = [[] for _ in range(blocks + 1)]
    for name, spec in ckpt.specs.items():
        block = ckpt.config.num_hidden_layers if spec.layer is None else spec.layer
        by_rows = spec.layer is None and spec.role in ("embed", "head")
        if spec.expert is None and not by_rows and (spec.layer is None or block < blocks):
            found[block].append(name)
    found[blocks] += head_panels(ckpt.config)
    return found


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """PyTorch's own operations here are elementwise and short: waking threads costs more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    arithmetic: str,
    activations: str,
    decode: int,
    threads: int | None,
    device: str,
) -> None:
    if arithmetic not in ("exact", "deployed") or activations not in ("float32", "bfloat16"):
        raise UsageError(
            f"No such arithmetic: {arithmetic} with {activations} activations",
            hint="Choose exact or deployed, float32 or bfloat16.",
        )
    if device not in get_args(Device):
        raise UsageError(f"No such device: {device}", hint="Choose auto, cpu or cuda.")
    if decode < 0 or (threads is not None and threads < 1):
        raise UsageError("decode must be at least 0 and threads at least 1")
    if not prompts or not all(prompts):
        raise UsageError("A prompt needs at least one token")
    for number, prompt in enumerate(prompts):
        bad = [token for token in prompt if not 0 <= token < config.vocab_size]
        if bad:
            raise UsageError(
                f"Prompt {number} holds token id {bad[0]}; the vocabulary ends at"
                f" {config.vocab_size - 1}"
            )
    size = config.index_head_dim
    if any(ratio == 4 for ratio in config.compress_ratios) and size & (size - 1):
        raise UsageError(f"index_head_dim is {size}: the Hadamard rotation needs a power of two")
