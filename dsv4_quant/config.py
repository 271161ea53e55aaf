"""ModelConfig: what config.json says, under config.json's own keys.

Two dialects exist: the published ``config.json`` and the flat ``inference/config.json`` that the
published ``generate.py`` reads. Both become the same ModelConfig. Every number is bounded, because
a config comes from a stranger; an unknown key is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_quant import strict_json
from dsv4_quant.config_keys import Keys
from dsv4_quant.errors import ConfigError, some

FP8_BLOCK = (128, 128)
"""Block of FP8 weights where the config does not say (the flat dialect never does)."""

MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_VALUES = 50_000
MAX_TENSORS = 500_000
"""V4-Pro-0813, the largest release, has 149,782."""


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
    """None where the config says that nothing is quantised."""
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
_REQUIRED = frozenset((*_INTS, *_FLOATS, "compress_ratios", "scoring_func"))

# Keys that would change the tensors or the arithmetic, if they ever said anything else.
_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}

# Keys that say nothing about the weights' layout; accepted and carried along.
_CARRIED = frozenset(
    (
        "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
        "initializer_range", "max_position_embeddings", "torch_dtype", "dtype",
        "transformers_version", "use_cache", "dspark_block_size", "dspark_noise_token_id",
        "_name_or_path", "auto_map",
    )
)  # fmt: skip
_QUANTIZATION = frozenset(
    (
        "activation_scheme", "fmt", "quant_method", "scale_fmt", "weight_block_size",
        "expert_dtype", "modules_to_not_convert", "ignored_layers", "dequantize",
    )
)  # fmt: skip
_QUANTIZATION_CHOICES: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "scale_fmt": ("ue8m0", "float32", None),
}
_ROPE = frozenset(
    ("type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
)
FLAT_KEYS = {
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

FLAT_ROPE_KEYS = {
    "original_seq_len": "original_max_position_embeddings",
    "rope_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
_FLAT_CARRIED = frozenset(("dtype", "scale_fmt", "max_batch_size", "max_seq_len"))
_FLAT_SPELLING = {key: short for short, key in (FLAT_KEYS | FLAT_ROPE_KEYS).items()}


def read_config(path: Path) -> ModelConfig:
    """Reads either dialect. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError("The config is larger than 1 MiB, no model's config is", file=path)
        raw = strict_json.parse(path.read_bytes(), max_values=MAX_CONFIG_VALUES)
    except OSError as error:
        raise ConfigError(f"The config cannot be read: {error.strerror}", file=path) from None
    except ValueError as error:
        raise ConfigError(f"The config is not valid JSON: {error}", file=path) from None
    return parse_config(raw, path)


def parse_config(raw: Any, path: Path | str = "config.json") -> ModelConfig:
    """A config's JSON object -> ModelConfig. Raises ConfigError that names file and key."""
    if not isinstance(raw, dict):
        raise ConfigError("The config is not a JSON object", file=path)
    if "dim" in raw and "hidden_size" not in raw:
        return _build(_from_flat(raw, path), raw, is_flat=True)
    return _build(Keys(raw, path), raw, is_flat=False)


def _from_flat(raw: Mapping[str, Any], path: Path | str) -> Keys:
    unknown = raw.keys() - FLAT_KEYS.keys() - FLAT_ROPE_KEYS.keys() - _FLAT_CARRIED
    if unknown:
        raise ConfigError(
            f"Unknown keys in the inference config: {some(map(strict_json.clip, unknown))}",
            file=path,
        )
    found = {FLAT_KEYS[key]: value for key, value in raw.items() if key in FLAT_KEYS}
    if raw.get("original_seq_len"):
        rope = {FLAT_ROPE_KEYS[key]: raw[key] for key in FLAT_ROPE_KEYS if key in raw}
        found["rope_scaling"] = rope | {"type": "yarn"}
    if "n_mtp_layers" not in raw:  # April's code builds one block, unasked
        ratios, layers = raw.get("compress_ratios"), raw.get("n_layers")
        if isinstance(ratios, list) and isinstance(layers, int):
            found["num_nextn_predict_layers"] = max(0, len(ratios) - layers)
    said = Keys({"dtype": "fp8", "scale_fmt": None, **raw}, path)
    said.choice("scale_fmt", _QUANTIZATION_CHOICES["scale_fmt"])
    if said.choice("dtype", ("fp8", "bf16")) == "fp8":
        found["quantization_config"] = {"weight_block_size": list(FP8_BLOCK)}
    return Keys(found, path, _FLAT_SPELLING)


def _build(keys: Keys, raw: Mapping[str, Any], *, is_flat: bool) -> ModelConfig:
    for key, value in _FIXED.items():
        if key in keys:
            keys.choice(key, (value,))
    _refuse_unknown(keys)
    keys.require(_REQUIRED)
    fields: dict[str, Any] = {key: keys.integer(key, *bounds) for key, bounds in _INTS.items()}
    fields |= {key: keys.number(key) for key in _FLOATS}
    fields |= {key: keys.number(key) for key in _OPTIONAL_FLOATS if key in keys}
    fields["compress_ratios"] = keys.integers("compress_ratios")
    fields["scoring_func"] = keys.choice("scoring_func", _SCORING)
    fields["rope_scaling"] = _rope(keys)
    if "num_nextn_predict_layers" in keys:
        fields["num_nextn_predict_layers"] = keys.integer("num_nextn_predict_layers", 0, 64)
    fields["weight_block_size"] = _block(keys)
    fields["expert_dtype"] = _expert_dtype(keys)
    if keys.values.get("dspark_target_layer_ids"):
        fields["dspark_target_layer_ids"] = keys.integers("dspark_target_layer_ids")
        fields["dspark_markov_rank"] = keys.integer("dspark_markov_rank", 1, 1 << 20)
    config = ModelConfig(**fields, is_flat=is_flat, raw=dict(raw))
    _check_together(config, keys)
    return config


def _refuse_unknown(keys: Keys) -> None:
    known = ModelConfig.__dataclass_fields__.keys() - {"raw", "is_flat", "weight_block_size"}
    unknown = keys.values.keys() - known - _CARRIED - _FIXED.keys() - {"quantization_config"}
    if unknown:
        raise ConfigError(
            f"Unknown keys: {some(map(strict_json.clip, unknown))}",
            file=keys.path,
            hint="This tool refuses to guess what they mean for the weights; remove them from the"
            " config if they mean nothing.",
        )


def _check_together(config: ModelConfig, keys: Keys) -> None:
    """What no single key can say."""
    blocks = config.num_hidden_layers + config.num_mtp_blocks
    if config.is_dspark and config.num_mtp_blocks < 1:
        keys.fail("compress_ratios", "has no entry for the mtp blocks of the DSpark keys")
    if any(layer >= config.num_hidden_layers for layer in config.dspark_target_layer_ids):
        keys.fail("dspark_target_layer_ids", "names a layer that is not there")
    if len(config.compress_ratios) < blocks:
        keys.fail(
            "compress_ratios", f"has {len(config.compress_ratios)} entries for {blocks} blocks"
        )
    if any(config.compress_ratios[config.num_hidden_layers : blocks]):
        keys.fail("compress_ratios", "is not 0 for an mtp block")
    if config.num_attention_heads * config.head_dim % config.o_groups:
        keys.fail("o_groups", "does not divide the number of heads times head_dim")
    if config.num_experts_per_tok > config.n_routed_experts:
        keys.fail("num_experts_per_tok", "is larger than n_routed_experts")
    if config.qk_rope_head_dim > config.head_dim or config.qk_rope_head_dim % 2:
        keys.fail("qk_rope_head_dim", "is odd or larger than head_dim")
    for key in ("hidden_size", "moe_intermediate_size"):
        if getattr(config, key) % 2:
            keys.fail(key, "is odd; FP4 packs two columns into a byte")
    if blocks * (6 * config.n_routed_experts + 64) > MAX_TENSORS:
        keys.fail("n_routed_experts", f"implies more than {MAX_TENSORS:,} tensors")


def _rope(keys: Keys) -> RopeScaling | None:
    rope = keys.nested("rope_scaling", _ROPE)
    if rope is None:
        return None
    for key in ("type", "rope_type"):
        if key in rope:
            rope.choice(key, ("yarn",))
    return RopeScaling(
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", 1, 1 << 32
        ),
        **{key: rope.number(key) for key in ("beta_fast", "beta_slow") if key in rope},
    )


def _block(keys: Keys) -> tuple[int, int] | None:
    quantization = keys.nested("quantization_config", _QUANTIZATION)
    if quantization is None:
        return None
    for key, choices in _QUANTIZATION_CHOICES.items():
        if key in quantization:
            quantization.choice(key, choices)
    block = quantization.values.get("weight_block_size", list(FP8_BLOCK))
    pair = block if isinstance(block, list) and len(block) == 2 else (0, 0)
    if not all(type(size) is int and 1 <= size <= 1 << 16 for size in pair):
        quantization.fail("weight_block_size", f"is {strict_json.shown(block)}, not two sizes")
    return (pair[0], pair[1])


def _expert_dtype(keys: Keys) -> str | None:
    """At the top level, or in quantization_config where later releases and transformers put it."""
    quantization = keys.values.get("quantization_config") or {}
    nested, top = quantization.get("expert_dtype"), keys.values.get("expert_dtype")
    if None not in (nested, top) and nested != top:
        keys.fail("expert_dtype", "differs between the top level and quantization_config")
    found = Keys({"expert_dtype": top if nested is None else nested}, keys.path)
    chosen: str | None = found.choice("expert_dtype", (None, "fp4", "fp8", "bf16"))
    return chosen
