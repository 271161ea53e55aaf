"""Which published release a checkpoint is, judged by its config and the formats in its headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv4_quant.catalogue import Formats
from dsv4_quant.config import ModelConfig

_COMMON = {
    "vocab_size": 129280,
    "num_hash_layers": 3,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "hc_mult": 4,
    "num_mtp_blocks": 1,
    "dspark_target_layer_ids": (),
    "dspark_markov_rank": 0,
}
_FLASH = _COMMON | {
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "n_routed_experts": 256,
    "compress_ratios": (0, 0, *(4, 128) * 20, 4, 0),
}
_PRO = _COMMON | {
    "hidden_size": 7168,
    "moe_intermediate_size": 3072,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "n_routed_experts": 384,
    "compress_ratios": (128, 128, *(4, 128) * 29, 4, 0),
}


def _dspark(base: Mapping[str, Any], markov_rank: int) -> dict[str, Any]:
    """The same model with DSpark's three blocks instead of April's one."""
    layers, ratios = base["num_hidden_layers"], base["compress_ratios"]
    return {
        **base,
        "compress_ratios": (*ratios, 0, 0),
        "num_mtp_blocks": 3,
        "dspark_target_layer_ids": (layers - 3, layers - 2, layers - 1),
        "dspark_markov_rank": markov_rank,
    }


RELEASES: Mapping[str, Mapping[str, Any]] = {
    "V4-Flash": _FLASH,
    "V4-Pro": _PRO,
    "V4-Flash-0731": _dspark(_FLASH, 256),
    "V4-Pro-0813": _dspark(_PRO, 512),
}
"""Release -> everything in its config that shapes a tensor (attributes of ModelConfig)."""

CUSTOM = "custom"
WITH_BASE = ("V4-Flash", "V4-Pro")
ALIKE = 4
"""With more differences than these a checkpoint is not said to resemble a release."""


@dataclass(frozen=True, slots=True)
class Release:
    """A release's name, or ``custom``; the note says what is uncertain, or what is different."""

    name: str
    note: str = ""


def guess_release(config: ModelConfig, formats: Formats) -> Release:
    """The release of a checkpoint.

    The -Base releases have the same config as the others; their F32 scales tell them apart.
    """
    differences = {name: _differences(config, shape) for name, shape in RELEASES.items()}
    name = min(differences, key=lambda release: len(differences[release]))
    if differences[name]:
        text = ", ".join(differences[name])
        return Release(CUSTOM, f"{name} but {text}" if len(differences[name]) <= ALIKE else "")
    if name not in WITH_BASE:
        return Release(name)
    scales = {formats.experts.scale, formats.dense.scale} - {None}
    if not scales:
        return Release(name, f"or {name}-Base: in BF16 they look alike")
    return Release(f"{name}-Base" if "f32" in scales else name)


def _differences(config: ModelConfig, shape: Mapping[str, Any]) -> list[str]:
    """What a config has otherwise than a release, such as ``n_routed_experts 160``."""
    found = []
    for key, value in shape.items():
        mine = getattr(config, key)
        if mine != value:
            found.append(key if isinstance(mine, tuple) else f"{key} {mine}")
    return found
