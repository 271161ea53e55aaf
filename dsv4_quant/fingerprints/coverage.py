"""What a script's prompts exercise of a model, and what they do not reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4_quant.catalogue import CSA_RATIO
from dsv4_quant.config import ModelConfig
from dsv4_quant.fingerprints.prompts import hash_layers, ratios_of
from dsv4_quant.fingerprints.script import Script


@dataclass(frozen=True, slots=True)
class Coverage:
    """Counts; everything is over all prompts of a script."""

    tokens: int
    distinct_tokens: int
    vocab_size: int
    n_routed_experts: int
    experts_hit: tuple[int, ...]
    """Per layer, the MTP block last if it took part."""
    hash_layers: int
    """How many of the layers, the first ones, choose experts by token id."""
    windows: dict[int, int]
    """Compression ratio -> entries that it has made at the end of the longest prompt."""
    index_topk: int | None
    """None without a layer that has an indexer."""
    sliding_window: int
    longest: int
    missed: tuple[str, ...]
    """In words: what was not reached."""


def coverage(config: ModelConfig, script: Script, hit: Sequence[Sequence[int]]) -> Coverage:
    """hit: per layer the experts that any token went to."""
    longest = max(script.lengths)
    ratios = ratios_of(config)
    known = {token for prompt in script.prompts for token in prompt}
    return Coverage(
        tokens=sum(script.lengths),
        distinct_tokens=len(known),
        vocab_size=config.vocab_size,
        n_routed_experts=config.n_routed_experts,
        experts_hit=tuple(len(experts) for experts in hit),
        hash_layers=len(hash_layers(config)),
        windows={ratio: longest // ratio for ratio in ratios},
        index_topk=config.index_topk if CSA_RATIO in ratios else None,
        sliding_window=config.sliding_window,
        longest=longest,
        missed=tuple(_missed(config, script, longest, hit)),
    )


def _missed(
    config: ModelConfig, script: Script, longest: int, hit: Sequence[Sequence[int]]
) -> list[str]:
    found = []
    if longest <= config.sliding_window:
        found.append(f"no prompt is longer than the sliding window ({config.sliding_window})")
    for ratio in ratios_of(config):
        if longest < ratio:
            found.append(f"no window of {ratio} tokens is ever finished")
    if CSA_RATIO in ratios_of(config) and longest // CSA_RATIO <= config.index_topk:
        found.append(f"there are never more compressed entries than index_topk {config.index_topk}")
    lacking = [
        f"{config.n_routed_experts - len(experts)} of {config.n_routed_experts} in layer {layer}"
        for layer, experts in enumerate(hit)
        if len(experts) < config.n_routed_experts
    ]
    if lacking:
        rest = len(lacking) - 4
        more = f" and in {rest} more layer{'s' if rest > 1 else ''}" if rest > 0 else ""
        found.append(f"experts: {', '.join(lacking[:4])}{more}")
    if not script.mtp and config.num_mtp_blocks:
        found.append("the tensors under mtp: that block's forward pass was not run")
    return found
