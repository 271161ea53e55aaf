"""ModelConfig: what config.json says, under config.json's own keys.

Two dialects exist: the published ``config.json`` and the flat ``inference/config.json`` that the
published ``generate.py`` reads. Both become the same ModelConfig. Every number is bounded, because
a config comes from a stranger; an unknown key is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_quant.errors import ConfigError, some

FP8_BLOCK = (128, 128)
"""Block of FP8 weights where the config does not say (the flat dialect never does)."""

MAX_CONFIG_BYTES = 1 << 20
MAX_TENSORS = 4_000_000


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN, applied in the layers with compression only."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The fields that shape the weights or the forward pass; names are config.json's keys."""

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_hash_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling | None
    routed_scaling_factor: float
    scoring_func: str
    swiglu_limit: float
    rms_norm_eps: float = 1e-6
    hc_eps: float = 1e-6
    num_nextn_predict_layers: int = 0
    expert_dtype: str | None = None
    weight_block_size: tuple[int, int] | None = None
    """None where the config holds no quantization_config (all BF16, or the flat dialect)."""
    dspark_target_layer_ids: tuple[int, ...] = ()
    dspark_markov_rank: int = 0
    is_flat: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The file's own keys, in their order."""

    @property
    def is_dspark(self) -> bool:
        """Whether the mtp blocks are a DSpark drafter (0731, 0813) instead of April's MTP."""
        return bool(self.dspark_target_layer_ids)

    @property
    def num_mtp_blocks(self) -> int:
        """Blocks ``mtp.k`` on disk.

        The DSpark releases say one in num_nextn_predict_layers and hold three; compress_ratios,
        one entry per block, tells the truth in every release.
        """
        if self.is_dspark:
            return len(self.compress_ratios) - self.num_hidden_layers
        return self.num_nextn_predict_layers

    @property
    def fp8_block(self) -> tuple[int, int]:
        """Rows and columns that share a scale in FP8 weights."""
        return self.weight_block_size or FP8_BLOCK


# Published key -> (least, most). The bounds are far beyond any model, and far below trouble.
_INTS = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "moe_intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 1024),
    "num_hash_layers": (0, 1024),
    "num_attention_heads": (1, 1 << 14),
    "head_dim": (2, 1 << 14),
    "qk_rope_head_dim": (2, 1 << 14),
    "q_lora_rank": (1, 1 << 20),
    "o_groups": (1, 1 << 14),
    "o_lora_rank": (1, 1 << 20),
    "n_routed_experts": (1, 1 << 16),
    "n_shared_experts": (1, 64),
    "num_experts_per_tok": (1, 1 << 12),
    "index_n_heads": (1, 1 << 14),
    "index_head_dim": (2, 1 << 14),
    "index_topk": (1, 1 << 24),
    "hc_mult": (1, 64),
    "hc_sinkhorn_iters": (1, 10_000),
    "sliding_window": (1, 1 << 24),
}
_FLOATS = (
    "rope_theta",
    "compress_rope_theta",
    "routed_scaling_factor",
    "swiglu_limit",
)
_OPTIONAL_FLOATS = ("rms_norm_eps", "hc_eps")
_SCORING = ("sqrtsoftplus", "sigmoid", "softmax")

# Keys that say nothing about the weights' layout; accepted and carried along.
_CARRIED = frozenset(
    "architectures attention_bias attention_dropout bos_token_id eos_token_id pad_token_id"
    " hidden_act initializer_range max_position_embeddings model_type norm_topk_prob"
    " num_key_value_heads tie_word_embeddings topk_method torch_dtype dtype transformers_version"
    " use_cache dspark_block_size dspark_noise_token_id _name_or_path auto_map".split()
)
_QUANTIZATION = frozenset(
    "activation_scheme fmt quant_method scale_fmt weight_block_size expert_dtype"
    " modules_to_not_convert ignored_layers dequantize".split()
)
_FLAT = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_hash_layers": "num_hash_layers",
    "n_mtp_layers": "num_nextn_predict_layers",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "swiglu_limit": "swiglu_limit",
    "q_lora_rank": "q_lora_rank",
    "head_dim": "head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "norm_eps": "rms_norm_eps",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "window_size": "sliding_window",
    "rope_theta": "rope_theta",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "hc_mult": "hc_mult",
    "hc_eps": "hc_eps",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "compress_rope_theta": "compress_rope_theta",
    "compress_ratios": "compress_ratios",
    "expert_dtype": "expert_dtype",
    "dspark_block_size": "dspark_block_size",
    "dspark_noise_token_id": "dspark_noise_token_id",
    "dspark_target_layer_ids": "dspark_target_layer_ids",
    "dspark_markov_rank": "dspark_markov_rank",
}
"""The flat dialect's keys -> config.json's. The inverse writes inference/config.json."""

_FLAT_ROPE = {
    "original_seq_len": "original_max_position_embeddings",
    "rope_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
_FLAT_CARRIED = frozenset(("dtype", "scale_fmt", "max_batch_size", "max_seq_len", "n_mtp_layers"))


def read_config(path: Path) -> ModelConfig:
    """Reads either dialect. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError("The config is larger than 1 MiB, no model's config is", file=path)
        raw = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise ConfigError(f"The config cannot be read: {error.strerror}", file=path) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The config is not valid JSON: {error}", file=path) from None
    return parse_config(raw, path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def parse_config(raw: Any, path: Path | str = "config.json") -> ModelConfig:
    """A config's JSON object -> ModelConfig. Raises ConfigError that names file and key."""
    if not isinstance(raw, dict):
        raise ConfigError("The config is not a JSON object", file=path)
    if "dim" in raw and "hidden_size" not in raw:
        return _build(_from_flat(raw, path), raw, path, is_flat=True)
    return _build(raw, raw, path, is_flat=False)


def _from_flat(raw: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    unknown = set(raw) - set(_FLAT) - set(_FLAT_ROPE) - _FLAT_CARRIED
    if unknown:
        raise ConfigError(f"Unknown keys in the inference config: {some(unknown)}", file=path)
    found = {_FLAT[key]: value for key, value in raw.items() if key in _FLAT}
    if raw.get("original_seq_len"):
        found["rope_scaling"] = {_FLAT_ROPE[k]: v for k, v in raw.items() if k in _FLAT_ROPE}
        found["rope_scaling"]["type"] = "yarn"
    if "num_nextn_predict_layers" not in found:  # April's code builds one block, unasked
        ratios, layers = found.get("compress_ratios"), found.get("num_hidden_layers")
        if isinstance(ratios, list) and isinstance(layers, int):
            found["num_nextn_predict_layers"] = len(ratios) - layers
    return found


def _build(
    keys: Mapping[str, Any], raw: Mapping[str, Any], path: Path | str, *, is_flat: bool
) -> ModelConfig:
    known = set(ModelConfig.__dataclass_fields__) | _CARRIED | {"quantization_config"}
    unknown = set(keys) - (known - {"raw", "is_flat", "weight_block_size"})
    if unknown:
        raise ConfigError(
            f"Unknown keys: {some(unknown)}",
            file=path,
            hint="This tool refuses to guess what they mean for the weights; remove them from the"
            " config if they mean nothing.",
        )
    fields: dict[str, Any] = {
        key: _int(keys, key, least, most, path) for key, (least, most) in _INTS.items()
    }
    fields |= {key: _float(keys, key, path) for key in _FLOATS}
    fields |= {key: _float(keys, key, path) for key in _OPTIONAL_FLOATS if key in keys}
    fields["compress_ratios"] = _ints(keys, "compress_ratios", path)
    fields["scoring_func"] = _choice(keys, "scoring_func", _SCORING, path)
    fields["rope_scaling"] = _rope(keys.get("rope_scaling"), path)
    if "num_nextn_predict_layers" in keys:
        fields["num_nextn_predict_layers"] = _int(keys, "num_nextn_predict_layers", 0, 64, path)
    quantization = keys.get("quantization_config")
    fields["weight_block_size"] = _block(quantization, path)
    nested = quantization.get("expert_dtype") if isinstance(quantization, dict) else None
    expert_dtype = keys.get("expert_dtype", nested)
    if expert_dtype not in (None, "fp4", "fp8", "bf16"):
        raise ConfigError(f"expert_dtype {expert_dtype!r} is not fp4, fp8 or bf16", file=path)
    fields["expert_dtype"] = expert_dtype
    if keys.get("dspark_target_layer_ids"):
        fields["dspark_target_layer_ids"] = _ints(keys, "dspark_target_layer_ids", path)
        fields["dspark_markov_rank"] = _int(keys, "dspark_markov_rank", 1, 1 << 20, path)
    config = ModelConfig(**fields, is_flat=is_flat, raw=dict(raw))
    _check_together(config, path)
    return config


def _check_together(config: ModelConfig, path: Path | str) -> None:
    """What no single key can say."""
    blocks = config.num_hidden_layers + config.num_mtp_blocks
    if config.is_dspark and config.num_mtp_blocks < 1:
        raise ConfigError("DSpark keys, but compress_ratios has no entry for mtp blocks", file=path)
    if len(config.compress_ratios) < blocks:
        raise ConfigError(
            f"compress_ratios has {len(config.compress_ratios)} entries for {blocks} blocks",
            file=path,
        )
    if any(config.compress_ratios[config.num_hidden_layers : blocks]):
        raise ConfigError("compress_ratios is not 0 for an mtp block", file=path)
    if config.num_attention_heads * config.head_dim % config.o_groups:
        raise ConfigError("o_groups does not divide num_attention_heads * head_dim", file=path)
    if config.num_experts_per_tok > config.n_routed_experts:
        raise ConfigError("num_experts_per_tok is larger than n_routed_experts", file=path)
    if max(config.qk_rope_head_dim - config.head_dim, config.qk_rope_head_dim % 2) > 0:
        raise ConfigError("qk_rope_head_dim is odd or larger than head_dim", file=path)
    if blocks * (6 * config.n_routed_experts + 64) > MAX_TENSORS:
        raise ConfigError(f"The config implies more than {MAX_TENSORS:,} tensors", file=path)


def _int(keys: Mapping[str, Any], key: str, least: int, most: int, path: Path | str) -> int:
    value = _required(keys, key, path)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(
            f"{key} is {_short(value)}, not an integer in {least}..{most}", file=path
        )
    return value


def _float(keys: Mapping[str, Any], key: str, path: Path | str) -> float:
    value = _required(keys, key, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ConfigError(f"{key} is {_short(value)}, not a positive number", file=path)
    return float(value)


def _ints(keys: Mapping[str, Any], key: str, path: Path | str) -> tuple[int, ...]:
    value = _required(keys, key, path)
    good = isinstance(value, list) and len(value) <= 2048
    if not good or not all(type(v) is int and 0 <= v < 1 << 20 for v in value):
        raise ConfigError(f"{key} is {_short(value)}, not a list of small integers", file=path)
    return tuple(value)


def _choice(
    keys: Mapping[str, Any], key: str, choices: tuple[str, ...], path: Path | str
) -> str:
    value = _required(keys, key, path)
    if value not in choices:
        raise ConfigError(f"{key} is {_short(value)}, not one of {', '.join(choices)}", file=path)
    return str(value)


def _required(keys: Mapping[str, Any], key: str, path: Path | str) -> Any:
    if key not in keys:
        raise ConfigError(
            f"The key {key} is missing", file=path, hint="Is this a DeepSeek-V4 config?"
        )
    return keys[key]


def _rope(value: Any, path: Path | str) -> RopeScaling | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError("rope_scaling is not an object", file=path)
    if value.get("type", value.get("rope_type", "yarn")) != "yarn":
        raise ConfigError(f"rope_scaling type {_short(value.get('type'))} is not yarn", file=path)
    return RopeScaling(
        factor=_float(value, "factor", path),
        original_max_position_embeddings=_int(
            value, "original_max_position_embeddings", 1, 1 << 32, path
        ),
        beta_fast=_float({"beta_fast": 32, **value}, "beta_fast", path),
        beta_slow=_float({"beta_slow": 1, **value}, "beta_slow", path),
    )


def _block(value: Any, path: Path | str) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError("quantization_config is not an object", file=path)
    unknown = set(value) - _QUANTIZATION
    if unknown:
        raise ConfigError(f"Unknown keys in quantization_config: {some(unknown)}", file=path)
    if value.get("quant_method", "fp8") != "fp8":
        raise ConfigError(f"quant_method {_short(value['quant_method'])} is not fp8", file=path)
    block = value.get("weight_block_size", list(FP8_BLOCK))
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(v) is int and 1 <= v <= 1 << 16 for v in block)
    ):
        raise ConfigError(f"weight_block_size is {_short(block)}, not two integers", file=path)
    return (block[0], block[1])


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "an integer"
    return text if len(text) <= 60 else text[:57] + "..."
