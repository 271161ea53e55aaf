"""The config of a synthetic checkpoint: a tiny model of our own, or a published one cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from dsv4_quant.catalogue import Catalogue, Formats, published_formats
from dsv4_quant.config import ModelConfig, parse_config, read_config
from dsv4_quant.errors import UsageError
from dsv4_quant.formats.blocks import BF16, FP4, ScaleKind, fp8

Experts = Literal["fp4", "fp8", "bf16"]

TINY: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 256,
    "index_head_dim": 128,
    "index_n_heads": 8,
    "index_topk": 8,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 5,
    "num_hash_layers": 1,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 4,
    "o_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 16,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 512,
    "compress_rope_theta": 160000,
    "compress_ratios": [0, 4, 128, 4, 0, 0],
}
"""Five layers with every compression ratio, one mtp block, eight experts: 9 MB in FP4."""

BUILT_IN: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "tiny-base": {**TINY, "expert_dtype": "fp8"},
}


def synthetic_catalogue(
    config: str | Path, experts: Experts | None, layers: int | None
) -> tuple[Catalogue, bytes]:
    """The catalogue of the checkpoint to make, and its config.json.

    ``config`` is ``tiny``, ``tiny-base`` or the path of a published config.json. A config whose
    own ``expert_dtype`` is "fp8" is a -Base release's: all its scales are F32, also when
    ``experts`` then asks for other experts.
    """
    parsed = _read(config)
    cut = parsed if layers is None else _cut(parsed, layers)
    scale: ScaleKind = "f32" if parsed.expert_dtype == "fp8" else "e8m0"
    claimed = published_formats(cut)
    dense = fp8(cut.fp8_block, scale) if claimed.dense.is_quantised else BF16
    forms = {"fp4": FP4, "fp8": fp8(cut.fp8_block, scale), "bf16": BF16}
    kind = experts or claimed.experts.kind
    if kind not in forms:
        raise UsageError(f"There are no {kind} experts", hint="Use fp4, fp8 or bf16.")
    catalogue = Catalogue(cut, Formats(experts=forms[kind], dense=dense, wo_a=dense))
    _check_blocks(catalogue)
    if experts is None:  # also where the config says nothing, as the first revision's
        return catalogue, json.dumps(dict(cut.raw), indent=2, ensure_ascii=False).encode()
    from dsv4_quant.conversion.configs import config_json  # here: it brings kernels

    return catalogue, config_json(catalogue, "hf")


def _read(config: str | Path) -> ModelConfig:
    if str(config) in BUILT_IN:
        return parse_config(BUILT_IN[str(config)], str(config))
    parsed = read_config(Path(config))
    if parsed.is_flat:
        raise UsageError(
            "This is the config of the published inference code",
            file=config,
            hint="Give the checkpoint's own config.json.",
        )
    return parsed


def _cut(config: ModelConfig, layers: int) -> ModelConfig:
    """The first layers of a model, and all its mtp blocks.

    DSpark's target layers are the last ones in every release; they stay the last ones.
    """
    if not 1 <= layers <= config.num_hidden_layers:
        raise UsageError(
            f"The model has {config.num_hidden_layers} layers, not {layers}",
            hint=f"Give 1 to {config.num_hidden_layers} layers.",
        )
    raw = dict(config.raw)
    raw["num_hidden_layers"] = layers
    raw["num_hash_layers"] = min(config.num_hash_layers, layers)
    raw["compress_ratios"] = [
        *config.compress_ratios[:layers],
        *config.compress_ratios[config.num_hidden_layers :],
    ]
    if config.is_dspark:
        count = min(len(config.dspark_target_layer_ids), layers)
        raw["dspark_target_layer_ids"] = list(range(layers - count, layers))
    return parse_config(raw)


def _check_blocks(catalogue: Catalogue) -> None:
    """FP4 has no ragged blocks: two codes share a byte, 32 a scale."""
    for spec in catalogue.specs.values():
        if spec.format == FP4 and spec.shape[1] % 32:
            raise UsageError(
                f"FP4 experts need rows of a multiple of 32 values, not {spec.shape[1]}",
                tensor=spec.name,
            )
