"""The small files of an output: config.json, inference/config.json, the index.

What config.json must say for each mixture of formats was found by loading them all in
transformers, and by reading how vLLM and SGLang decide:
- expert_dtype "fp4" or "fp8" stands at the top level while the experts are quantised, and goes
  when they are BF16;
- modules_to_not_convert names, by full path without ".weight", the modules that the fp8 method
  would cover but that are stored in BF16; with such a list "head" must be in it too;
- nothing quantised: no quantization_config.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv4_quant.catalogue import Catalogue, Formats, Layout
from dsv4_quant.checkpoint.folder import INDEX
from dsv4_quant.checkpoint.sidecars import carried_files
from dsv4_quant.config import FLAT_KEYS, FLAT_ROPE_KEYS, ModelConfig
from dsv4_quant.conversion.plan import Plan
from dsv4_quant.formats.blocks import Format

CONFIG = "config.json"
INFERENCE_CONFIG = "inference/config.json"

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
}


def small_files(plan: Plan) -> dict[str, bytes | Path]:
    """Everything but the weights, in the order in which it appears; paths are copied."""
    source, formats = plan.source, plan.catalogue.formats
    found: dict[str, bytes | Path] = dict(carried_files(source.root))
    if plan.request.layout == "hf":
        weight_map = {tensor: file.name for file in plan.files for tensor in file.tensors}
        found[INDEX] = index_json(weight_map, sum(step.out.nbytes for step in plan.steps))
    if plan.request.layout == "mp" or (source.root / INFERENCE_CONFIG).exists():
        found[INFERENCE_CONFIG] = inference_config_json(source.config, formats)
    found[CONFIG] = config_json(plan.catalogue, plan.request.layout)
    return found


def config_json(catalogue: Catalogue, layout: Layout) -> bytes:
    """The output's config.json: the source's, with what it says of formats made true."""
    config, formats = catalogue.config, catalogue.formats
    raw = published_config(config) if config.is_flat else dict(config.raw)
    kinds = {formats.experts.kind, formats.dense.kind, formats.wo_a.kind}
    quantization = raw.pop("quantization_config", None) or {
        **QUANTIZATION,
        "weight_block_size": list(config.fp8_block),
    }
    quantization = {
        key: value
        for key, value in quantization.items()
        if key not in ("modules_to_not_convert", "ignored_layers", "expert_dtype")
    }
    skipped = [] if layout == "mp" else list(_unquantised_modules(catalogue))
    if skipped:
        quantization["modules_to_not_convert"] = [*skipped, "head"]
    after = {} if kinds == {"bf16"} else {"quantization_config": quantization}
    said = {} if formats.experts.kind == "bf16" else {"expert_dtype": formats.experts.kind}
    edited = _placed(raw, said, after)
    return (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()


def _placed(raw: dict[str, Any], said: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The edited keys where the published files have them: after eos_token_id, o_lora_rank ..."""
    raw.pop("expert_dtype", None)
    out: dict[str, Any] = {}
    for key, value in raw.items():
        out[key] = value
        if key == "eos_token_id":
            out |= said
        if key == "qk_rope_head_dim":
            out |= after
    return out | said | after


def _unquantised_modules(catalogue: Catalogue) -> Iterable[str]:
    """Modules of the published fp8 method that are stored in BF16, by their names on disk."""
    seen = set()
    for spec in catalogue.specs.values():
        if spec.kind == "fixed" or spec.format.is_quantised:
            continue
        module = spec.name.removesuffix(".weight")
        if spec.expert is not None:
            module = module.rsplit(".", 2)[0]
        if module not in seen:
            seen.add(module)
            yield module


def inference_config_json(config: ModelConfig, formats: Formats) -> bytes:
    """The flat inference/config.json that the published generate.py reads.

    As its README says, FP8 experts are expressed by leaving expert_dtype out. BF16 experts over
    FP8 layers are none of the published code's modes; the file says them all the same.
    """
    if config.is_flat:
        flat = dict(config.raw)
    else:
        flat = {short: config.raw[key] for short, key in FLAT_KEYS.items() if key in config.raw}
        rope = config.raw.get("rope_scaling") or {}
        flat |= {short: rope[key] for short, key in FLAT_ROPE_KEYS.items() if key in rope}
        flat.pop("n_mtp_layers", None)
        if config.num_mtp_blocks != 1:  # April's code has no such key and builds one
            flat["n_mtp_layers"] = config.num_mtp_blocks
    for key in ("dtype", "scale_fmt", "expert_dtype", "norm_eps", "hc_eps"):
        flat.pop(key, None)
    flat["dtype"] = _flat_dtype(formats.dense)
    if "fp8" in (formats.dense.kind, formats.experts.kind):
        flat["scale_fmt"] = "ue8m0"
    if formats.experts.kind != formats.dense.kind:
        flat["expert_dtype"] = formats.experts.kind
    return (json.dumps(flat, indent=4) + "\n").encode()


def _flat_dtype(dense: Format) -> str:
    return "fp8" if dense.kind == "fp8" else "bf16"


def published_config(config: ModelConfig) -> dict[str, Any]:
    """config.json's keys for a checkpoint that came with the flat dialect only.

    What the flat dialect leaves out is the same in every published V4 config.
    """
    flat = config.raw
    known = {key: flat[short] for short, key in FLAT_KEYS.items() if short in flat}
    known["compress_ratios"] = list(config.compress_ratios)
    rope = {key: flat[short] for short, key in FLAT_ROPE_KEYS.items() if short in flat}
    scaling = {"rope_scaling": {**rope, "type": "yarn"}} if config.rope_scaling else {}
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hc_eps": config.hc_eps,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4",
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1 if config.is_dspark else config.num_mtp_blocks,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **{key: value for key, value in known.items() if key != "num_nextn_predict_layers"},
        **scaling,
    }


def index_json(weight_map: dict[str, str], total_size: int) -> bytes:
    """model.safetensors.index.json as published: indent 2, names sorted."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode()
