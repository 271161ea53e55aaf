"""Attention: a sliding window of single tokens, and compressed entries for all that came before.

All heads share one key per token, and the key is the value too. Queries are of low rank, and so
is the output, group by group. A head may attend to nothing: its sink takes part in the softmax as
if it were an entry whose value is 0.

t positions, d hidden_size, n num_attention_heads, h head_dim, q q_lora_rank, g o_groups,
o o_lora_rank, u keys of the window, e compressed entries, r compress ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv4_quant.catalogue import CSA_RATIO
from dsv4_quant.config import ModelConfig
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.attend import attend, window_start
from dsv4_quant.model.batch import Chunk
from dsv4_quant.model.compressor import Compressor, CompressorState
from dsv4_quant.model.functions import rms_norm
from dsv4_quant.model.indexer import Indexer
from dsv4_quant.model.rope import Rope
from dsv4_quant.model.weights import Weights


@dataclass
class AttentionState:
    """What one prompt has left behind in one layer. Decoding goes on from here."""

    window: Tensor
    """Keys ``[u, h]`` from ``window_start`` of the next position on."""
    compressed: CompressorState | None
    index: CompressorState | None


class Attention:
    """One layer's attention. Args: weights: the tensors under ``attn.``."""

    def __init__(
        self, weights: Weights, ratio: int, config: ModelConfig, a: Arithmetic, rope: Rope
    ) -> None:
        self._a, self._rope, self._config, self._ratio = a, rope, config, ratio
        self._wq_a = weights.matrix("wq_a.weight")  # [q, d]
        self._q_norm = weights.vector("q_norm.weight")  # [q]
        self._wq_b = weights.matrix("wq_b.weight")  # [n * h, q]
        self._wkv = weights.matrix("wkv.weight")  # [h, d]
        self._kv_norm = weights.vector("kv_norm.weight")  # [h]
        self._sink = weights.vector("attn_sink")  # [n]
        self._wo_a = weights.matrix("wo_a.weight")  # [g * o, n * h / g]
        self._wo_b = weights.matrix("wo_b.weight")  # [d, g * o]
        self._store = partial(a.store_key, rope_dim=config.qk_rope_head_dim)
        under = weights.under("compressor.")
        self._compressor = Compressor(under, ratio, config, a, rope, self._store) if ratio else None
        is_indexed = ratio == CSA_RATIO
        self._indexer = (
            Indexer(weights.under("indexer."), ratio, config, a, rope) if is_indexed else None
        )

    def start(self) -> AttentionState:
        """A prompt's state before its first token."""
        return AttentionState(
            window=torch.zeros(0, self._config.head_dim),
            compressed=self._compressor.start() if self._compressor else None,
            index=self._indexer.compressor.start() if self._indexer else None,
        )

    def __call__(self, x: Tensor, chunk: Chunk, states: list[AttentionState]) -> Tensor:
        """Goes on by one chunk of positions: ``[t, d]`` -> ``[t, d]``."""
        a, c = self._a, self._config
        qr = a.round(rms_norm(a.linear(x, self._wq_a), self._q_norm, c.rms_norm_eps))  # [t, q]
        q = a.linear(qr, self._wq_b).view(len(x), -1, c.head_dim)  # [t, n, h]
        q = a.round(rms_norm(q, None, c.rms_norm_eps))
        q = a.round(self._rope(q, chunk.positions))
        kv = a.round(rms_norm(a.linear(x, self._wkv), self._kv_norm, c.rms_norm_eps))  # [t, h]
        kv = self._store(a.round(self._rope(kv, chunk.positions)))

        masks = self._compress(x, qr, chunk, states)
        o = torch.empty_like(q)  # [t, n, h]
        for span, mask in zip(chunk.spans, masks, strict=True):
            state = states[span.prompt]
            keys = torch.cat((state.window, kv[span.rows]))  # [u, h]
            entries = state.compressed.entries if state.compressed else keys[:0]  # [e, h]
            o[span.rows] = attend(
                q[span.rows], keys, entries, mask, self._sink,
                start=span.start, window=c.sliding_window, a=a,
            )  # fmt: skip
            done = window_start(span.stop, c.sliding_window) - window_start(
                span.start, c.sliding_window
            )
            state.window = keys[done:]
        o = a.round(self._rope(o, chunk.positions, inverse=True))
        return a.linear(self._mix_groups(o), self._wo_b)

    def _compress(
        self, x: Tensor, qr: Tensor, chunk: Chunk, states: list[AttentionState]
    ) -> list[Tensor]:
        """Extends every prompt's entries; which of them its positions see, bool ``[t, e]`` each."""
        if self._compressor is None:
            return [torch.zeros(len(chunk.positions[s.rows]), 0).bool() for s in chunk.spans]
        candidates, logits = self._compressor.offer(x)  # [t, c * h] each
        if self._indexer is not None:
            index_candidates, index_logits = self._indexer.compressor.offer(x)  # [t, c * j]
            index_q, by_head = self._indexer.ask(x, qr, chunk.positions)
        masks = []
        for span in chunk.spans:
            rows, state = span.rows, states[span.prompt]
            assert state.compressed is not None
            self._compressor.extend(state.compressed, candidates[rows], logits[rows])
            allowed = (chunk.positions[rows] + 1) // self._ratio  # [t] finished windows
            if self._indexer is None:
                masks.append(torch.arange(len(state.compressed.entries)) < allowed[:, None])
                continue
            assert state.index is not None
            self._indexer.compressor.extend(state.index, index_candidates[rows], index_logits[rows])
            keys = state.index.entries
            masks.append(self._indexer.choose(index_q[rows], by_head[rows], keys, allowed))
        return masks

    def _mix_groups(self, o: Tensor) -> Tensor:
        """Group i of the heads goes through its own o rows of wo_a: ``[t, n, h] -> [t, g * o]``."""
        groups = o.reshape(len(o), self._config.o_groups, -1)  # [t, g, n * h / g]
        o_rank = self._config.o_lora_rank
        mixed = [
            self._a.linear(groups[:, i], self._wo_a, (i * o_rank, (i + 1) * o_rank), quantise=False)
            for i in range(self._config.o_groups)
        ]
        return torch.cat(mixed, -1)
