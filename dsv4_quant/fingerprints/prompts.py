"""Prompts that exercise a checkpoint: every boundary, every expert of the hash layers.

What is special in this model happens at certain lengths: a compression ratio r finishes a window
at position r - 1, position ``sliding_window`` is the first that forgets, and from position
``4 * (index_topk + 1) - 1`` on there are more compressed entries than the indexer keeps. So there
is a short prompt that ends just beyond each of the first two, and a long one that goes through all.
For V4-Flash that is 2,439 tokens in all, for V4-Pro 4,743: about as many as it takes for the scored
layers to go to nearly every expert, and few enough that reading the weights is half of the cost.

Tokens: first those that lead to every expert of the hash layers, then others in a fixed order.
They are no text; text can be given instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.catalogue import CSA_RATIO
from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UnreadableError
from dsv4_quant.model.weights import Source

LONGEST = 8192
"""Tokens of a prompt, whatever a config says."""

BEYOND_TOPK = 8
"""The long prompt has 1/8 more compressed entries than the indexer keeps."""

SEED = 20260424

Ids = NDArray[np.int64]


def choose_prompts(ckpt: Source) -> list[list[int]]:
    """Token ids, a pure function of the config and of the hash layers' tables.

    Raises UnreadableError where a table names an expert that does not exist.
    """
    config = ckpt.config
    tables = list(_tables(ckpt))
    cover = cover_experts(np.concatenate(tables, axis=1)) if tables else []
    lengths = prompt_lengths(config)
    lengths[-1] = min(LONGEST, lengths[-1] + max(0, len(cover) - sum(lengths)))
    tokens = _continued(cover, config.vocab_size)
    return [[next(tokens) for _ in range(length)] for length in lengths]


def prompt_lengths(config: ModelConfig) -> list[int]:
    """Ascending; the last prompt goes through everything that the others end at."""
    ratios = ratios_of(config)
    edges = {1, config.sliding_window + 1, *(ratio + 1 for ratio in ratios)}
    longest = 2 * max(edges)
    if CSA_RATIO in ratios:
        more = max(config.index_topk // BEYOND_TOPK, CSA_RATIO)
        longest = max(longest, CSA_RATIO * (config.index_topk + more))
    return sorted({min(length, LONGEST) for length in (*edges, longest)})


def ratios_of(config: ModelConfig) -> list[int]:
    """The compression ratios of the layers, ascending, without 0."""
    return sorted(set(config.compress_ratios[: config.num_hidden_layers]) - {0})


def hash_layers(config: ModelConfig) -> range:
    """Layers whose experts are chosen by token id."""
    return range(min(config.num_hash_layers, config.num_hidden_layers))


def _tables(ckpt: Source) -> Iterator[Ids]:
    """Per hash layer, what each token goes to ``[v, k]``; layer l's experts count from l * e."""
    experts = ckpt.config.n_routed_experts
    for layer in hash_layers(ckpt.config):
        name = f"layers.{layer}.ffn.gate.tid2eid"
        table = ckpt.read(name).codes.astype(np.int64, copy=False)
        if not 0 <= int(table.min()) <= int(table.max()) < experts:
            raise UnreadableError("A token is routed to an expert that does not exist", tensor=name)
        yield table + layer * experts


def cover_experts(table: Ids) -> list[int]:
    """Few tokens (rows) that together name every value of a table that any token names.

    Greedy: each next token names the most values that no token before it has; of several the
    lowest id.
    """
    wanted = np.zeros(int(table.max()) + 1, bool)
    wanted[table] = True
    chosen: list[int] = []
    while wanted.any() and len(chosen) < LONGEST:
        token = int(wanted[table].sum(axis=1).argmax())
        wanted[table[token]] = False
        chosen.append(token)
    return chosen


def _continued(first: list[int], vocab_size: int) -> Iterator[int]:
    """These tokens, then all others in an order that is the same everywhere; then all again."""
    yield from first
    given = set(first)
    draws = np.random.PCG64(SEED).random_raw(vocab_size)  # numpy promises that stream forever
    order = [int(token) for token in np.argsort(draws, kind="stable")]
    yield from (token for token in order if token not in given)
    while True:
        yield from order
