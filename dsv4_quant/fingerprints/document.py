"""A fingerprint, as an object. ``file`` writes it down and reads it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsv4_quant.config import ModelConfig
from dsv4_quant.fingerprints.coverage import Coverage
from dsv4_quant.fingerprints.machine import Machine
from dsv4_quant.fingerprints.script import Script
from dsv4_quant.fingerprints.sketch import Digest
from dsv4_quant.fingerprints.watcher import SubLayer

TOP = 20
"""Logits that are kept of a spot."""

_STORAGE = ("expert_dtype", "weight_block_size", "is_flat", "raw", "num_nextn_predict_layers")
"""Fields of ModelConfig that do not say what the weights compute."""


@dataclass(frozen=True, slots=True)
class Spot:
    """The distribution of the next token at one position, as far as it is kept.

    ids are the likeliest tokens, best first. Their log-probabilities are ``logits - lse``: of a
    forward pass lse is the log-sum-exp of all logits; of a served model the logits are the
    log-probabilities that it gave, and lse is 0. Without logits only the order is known.
    """

    ids: tuple[int, ...]
    logits: tuple[float, ...]
    lse: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What only a forward pass of our own can say."""

    machine: Machine
    model: Mapping[str, Any]
    """The config's fields that shape the arithmetic."""
    formats: Mapping[str, str]
    value_digest: str | None
    coverage: Coverage
    experts_hit: tuple[tuple[int, ...], ...]
    tables: Mapping[str, str]
    """Weights that the pass may use without showing them (``tables``): group -> digest."""
    logits: tuple[Digest, ...]
    """Per prompt, of all positions."""
    mtp_logits: tuple[Digest, ...]
    streams: tuple[SubLayer, ...]
    """In the order of the pass: attn and ffn of every layer, the MTP block last."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a checkpoint says on fixed prompts; without ``measured``, what a served model said."""

    tool: str
    script: Script
    spots: tuple[tuple[Spot, ...], ...]
    """Per prompt, at the positions of ``script.spots``."""
    measured: Measured | None
    source: str | None = None
    """Of a served model: where its answers come from, in its own words."""


def describe_model(config: ModelConfig) -> dict[str, Any]:
    """The fields that shape the forward pass, as JSON's own types."""
    found = {key: value for key, value in asdict(config).items() if key not in _STORAGE}
    found["compress_ratios"] = list(config.compress_ratios[: config.num_hidden_layers])
    found["dspark_target_layer_ids"] = list(config.dspark_target_layer_ids)
    found["num_mtp_blocks"] = config.num_mtp_blocks
    return found
