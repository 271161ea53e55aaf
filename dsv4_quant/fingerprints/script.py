"""What is run, and where it is looked at: all that it takes to repeat a recording.

A spot is a position whose logits are kept (the highest of them). A row is a position whose streams
are hashed on their own in every layer, so that a difference can be narrowed down to positions and,
from there, to experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsv4_quant.catalogue import CSA_RATIO
from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UsageError
from dsv4_quant.fingerprints.prompts import LONGEST, ratios_of

Arithmetic = Literal["exact", "deployed"]
Activations = Literal["float32", "bfloat16"]
Places = tuple[tuple[int, ...], ...]
"""Per prompt, positions in ascending order."""

MAX_PROMPTS = 8
SPOTS, ROWS = 96, 256
"""How many a fingerprint has at most, over all prompts."""


@dataclass(frozen=True, slots=True)
class Script:
    """One forward pass and the places that are looked at."""

    prompts: tuple[tuple[int, ...], ...]
    spots: Places
    rows: Places
    arithmetic: Arithmetic = "exact"
    activations: Activations = "float32"
    mtp: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens per prompt."""
        return [len(prompt) for prompt in self.prompts]

    def only(self, prompts: Sequence[int]) -> Script:
        """The same for some of the prompts, by number."""
        return replace(
            self,
            prompts=tuple(self.prompts[prompt] for prompt in prompts),
            spots=tuple(self.spots[prompt] for prompt in prompts),
            rows=tuple(self.rows[prompt] for prompt in prompts),
        )


def make_script(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    arithmetic: Arithmetic = "exact",
    activations: Activations = "float32",
) -> Script:
    """The script for some prompts. The MTP block takes part if it is one of the April kind.

    Raises UsageError for more than 8 prompts, or one of more than 8,192 tokens.
    """
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise UsageError(f"A fingerprint has 1 to {MAX_PROMPTS} prompts, not {len(prompts)}")
    lengths = [len(prompt) for prompt in prompts]
    if max(lengths) > LONGEST or not min(lengths):
        raise UsageError(f"A fingerprint's prompts have 1 to {LONGEST:,} tokens")
    quotas = map(len, _shared_out(lengths, SPOTS))
    return Script(
        prompts=tuple(tuple(prompt) for prompt in prompts),
        spots=tuple(_spots(config, *pair) for pair in zip(lengths, quotas, strict=True)),
        rows=_shared_out(lengths, ROWS),
        arithmetic=arithmetic,
        activations=activations,
        mtp=config.num_mtp_blocks == 1 and not config.is_dspark,
    )


def _spots(config: ModelConfig, length: int, quota: int) -> tuple[int, ...]:
    """The last position, those on both sides of every boundary, and others evenly between."""
    edges = [length - 1, 0]
    if CSA_RATIO in ratios_of(config):
        edges += _both_sides(first_choice(config))
    edges += _both_sides(config.sliding_window)
    for ratio in ratios_of(config):
        edges += [*_both_sides(ratio - 1), *_both_sides(2 * ratio - 1), ratio]
    found = dict.fromkeys(edge for edge in edges if 0 <= edge < length)
    missing = quota - len(found)
    found |= dict.fromkeys(evenly(length, max(missing, 0)))
    return tuple(sorted(list(found)[:quota]))


def first_choice(config: ModelConfig) -> int:
    """The first position that sees more compressed entries than the indexer keeps."""
    return CSA_RATIO * (config.index_topk + 1) - 1


def _both_sides(position: int) -> tuple[int, int]:
    return position - 1, position


def _shared_out(lengths: Sequence[int], budget: int) -> Places:
    """Positions of every prompt, as many of each as can be; the longest take what others leave."""
    found: dict[int, tuple[int, ...]] = {}
    for left, (length, prompt) in enumerate(
        sorted((length, prompt) for prompt, length in enumerate(lengths))
    ):
        share = budget // (len(lengths) - left)
        found[prompt] = tuple(evenly(length, share))
        budget -= len(found[prompt])
    return tuple(found[prompt] for prompt in range(len(lengths)))


def evenly(length: int, count: int) -> Iterable[int]:
    """Up to ``count`` of range(length), evenly spaced, with both ends."""
    if count >= length:
        return range(length)
    if count < 2:
        return range(length - count, length)
    return sorted({i * (length - 1) // (count - 1) for i in range(count)})
