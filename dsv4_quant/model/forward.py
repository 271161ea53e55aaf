"""forward: the logits of a checkpoint for some prompts, a layer at a time.

All prompts go through a layer before the next is read, so every weight is read once, and what
memory holds is one layer's dense weights, one or two experts, and the prompts' streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UsageError
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.batch import Batch
from dsv4_quant.model.block import Setting, run_block
from dsv4_quant.model.head import embed, logits
from dsv4_quant.model.linear import Workers
from dsv4_quant.model.mtp import check_mtp, mtp_streams
from dsv4_quant.model.observer import Observer
from dsv4_quant.model.rope import Rope
from dsv4_quant.model.streams import expand
from dsv4_quant.model.weights import Reader, Source, Weights


@dataclass(frozen=True)
class Result:
    """What a forward pass found."""

    logits: list[Tensor]
    """Per prompt ``[positions, vocab_size]`` float32."""
    mtp_logits: list[Tensor] | None
    """The same of the MTP block, if it was asked for."""
    experts_hit: list[list[int]]
    """Per layer (the MTP block last), the experts that any token went to, ascending."""


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
        observer: is told what happens in every layer.
        threads: for products; PyTorch's own number if not given. They change no bit.

    Returns:
        logits of every position of every prompt.

    Raises:
        UsageError: empty prompts, ids outside the vocabulary, or an MTP block that is not there.
    """
    config = ckpt.config
    _check(config, prompts, arithmetic, activations, decode, threads)
    if mtp:
        check_mtp(config)
    watcher = observer or Observer()
    steps = config.num_hidden_layers + 1 + mtp
    with Workers(threads) as workers, _one_torch_thread(), Reader(ckpt) as reader:
        a = Arithmetic(arithmetic == "deployed", activations == "bfloat16", workers)
        batch = Batch([list(prompt) for prompt in prompts], decode)
        length = max(batch.lengths)
        set_ = Setting(
            config, batch, a,
            Rope(config, compressed=False, length=length),
            Rope(config, compressed=True, length=length),
            watcher,
        )  # fmt: skip
        dense = _dense_names(ckpt)
        hit = []
        h = expand(embed(batch.tokens, reader), config.hc_mult)  # [t, s, d]
        for layer in range(config.num_hidden_layers):
            then = dense.get(layer + 1, []) if layer + 1 < config.num_hidden_layers else []
            weights = Weights(reader, f"layers.{layer}.")
            hit.append(run_block(h, layer, weights, then, set_).hit())
            watcher.finished(layer + 1, steps)
        result = _by_prompt(logits(h, Weights(reader), config, a), batch)
        watcher.finished(config.num_hidden_layers + 1, steps)
        if not mtp:
            return Result(result, None, hit)
        weights = Weights(reader, "mtp.0.")
        h = mtp_streams(h, batch.tokens, weights, config, a)
        hit.append(run_block(h, config.num_hidden_layers, weights, [], set_).hit())
        mtp_result = _by_prompt(logits(h, weights, config, a), batch)
        watcher.finished(steps, steps)
        return Result(result, mtp_result, hit)


def _by_prompt(rows: Tensor, batch: Batch) -> list[Tensor]:
    return [rows[batch.rows(prompt)] for prompt in range(len(batch.lengths))]


def _dense_names(ckpt: Source) -> dict[int, list[str]]:
    """Per layer the tensors that every token needs."""
    found: dict[int, list[str]] = {}
    for name, spec in ckpt.specs.items():
        if spec.layer is not None and spec.expert is None:
            found.setdefault(spec.layer, []).append(name)
    return found


@contextmanager
def _one_torch_thread() -> Iterator[None]:
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
) -> None:
    if arithmetic not in ("exact", "deployed") or activations not in ("float32", "bfloat16"):
        raise UsageError(
            f"No such arithmetic: {arithmetic} with {activations} activations",
            hint="Choose exact or deployed, float32 or bfloat16.",
        )
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
