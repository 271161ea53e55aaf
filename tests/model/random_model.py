"""Small random models of any shape, in memory, and the same models in transformers.

Weights hold values that BF16 can hold and are scaled so that the model is calm: every sub-layer's
output is of the size of the streams, or a tenth of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsv4_quant.catalogue import Catalogue, Formats, TensorSpec
from dsv4_quant.config import ModelConfig, parse_config
from dsv4_quant.formats import bf16
from dsv4_quant.formats.blocks import BF16, Tensor

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_hash_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "sliding_window": 16,
    "compress_ratios": [0, 4, 16, 4],
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
}


class MemorySource:
    """What the model needs of a checkpoint, from a dict; counts what is read."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.tensors = dict(tensors)
        plain = Catalogue(config, Formats(BF16, BF16, BF16)).specs
        self.specs: dict[str, TensorSpec] = plain
        self.reads: list[str] = []

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]

    def announce(self, name: str, start: int, stop: int) -> int:
        return 0

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        whole = self.tensors[name]
        assert not whole.format.is_quantised
        shape = (stop - start, *whole.shape[1:])
        return Tensor(whole.format, shape, whole.codes[start:stop])


def random_source(seed: int = 0, **changes: Any) -> MemorySource:
    """A model of the BASE config with some keys changed."""
    config = parse_config({**BASE, **changes})
    rng = np.random.default_rng(seed)
    specs = Catalogue(config, Formats(BF16, BF16, BF16)).specs
    return MemorySource(config, {n: _tensor(s, config, rng) for n, s in specs.items()})


def _tensor(spec: TensorSpec, config: ModelConfig, rng: np.random.Generator) -> Tensor:
    if spec.format.kind == "i64":
        rows = [
            rng.permutation(config.n_routed_experts)[: spec.shape[1]] for _ in range(spec.shape[0])
        ]
        return Tensor(spec.format, spec.shape, np.array(rows, np.int64))
    values = (_middle(spec.name) + _spread(spec) * rng.standard_normal(spec.shape)).astype(
        np.float32
    )
    if spec.format.kind == "f32":
        return Tensor(spec.format, spec.shape, values)
    rounded = values.view(np.uint32) & np.uint32(0xFFFF0000)
    return Tensor(spec.format, spec.shape, bf16.encode(rounded.view(np.float32)))


def _middle(name: str) -> float:
    return 1.0 if "norm" in name or name.endswith("_scale") else 0.0


def _spread(spec: TensorSpec) -> float:
    name = spec.name
    if name.endswith(("attn_sink", "ape")) or name == "embed.weight":
        return 1.0
    if len(spec.shape) == 1:
        return 0.2
    damped = 0.3 if name.endswith(("w2.weight", "wo_b.weight")) else 1.0
    return damped * float(spec.shape[1]) ** -0.5


def decoded(source: MemorySource) -> dict[str, torch.Tensor]:
    """Every tensor as transformers is to have it: float32, tables int64."""
    return {
        name: torch.from_numpy(t.codes if t.format.kind == "i64" else t.decode())
        for name, t in source.tensors.items()
    }


def transformers_model(source: Any, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The same model in transformers, float32."""
    from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

    config: ModelConfig = source.config
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(DeepseekV4Config(**_their_config(config)))
    state = _their_names(config, tensors)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and not missing, (missing, unexpected)
    return _with_rope(model).eval()


def _with_rope(model: torch.nn.Module) -> torch.nn.Module:
    """Buffers that no checkpoint holds were made on the meta device: make them again."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DeepseekV4RotaryEmbedding):
                setattr(module, name, DeepseekV4RotaryEmbedding(child.config))
    return model


_SAME_KEYS = """
    vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads head_dim
    q_lora_rank num_experts_per_tok n_routed_experts n_shared_experts scoring_func hc_mult hc_eps
    routed_scaling_factor rope_theta compress_rope_theta hc_sinkhorn_iters swiglu_limit o_groups
    sliding_window o_lora_rank index_n_heads index_head_dim index_topk rms_norm_eps
""".split()  # noqa: SIM905


def _their_config(c: ModelConfig) -> dict[str, Any]:
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention"}
    ratios = c.compress_ratios[: c.num_hidden_layers]
    others = {r for r in ratios if r not in kinds}
    assert len(others) <= 1, "transformers knows one ratio for HCA"
    factor = {"partial_rotary_factor": c.qk_rope_head_dim / c.head_dim}
    compress: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": c.compress_rope_theta,
        **factor,
    }
    if c.rope_scaling is not None:
        compress |= {
            "rope_type": "yarn",
            "factor": c.rope_scaling.factor,
            "original_max_position_embeddings": c.rope_scaling.original_max_position_embeddings,
            "beta_fast": c.rope_scaling.beta_fast,
            "beta_slow": c.rope_scaling.beta_slow,
            "attention_factor": 1.0,
        }
    return {
        **{key: getattr(c, key) for key in _SAME_KEYS},
        **factor,
        "layer_types": [kinds.get(r, "heavily_compressed_attention") for r in ratios],
        "compress_rates": {
            "compressed_sparse_attention": 4,
            "heavily_compressed_attention": next(iter(others), 128),
        },
        "mlp_layer_types": [
            "hash_moe" if layer < c.num_hash_layers else "moe" for layer in range(len(ratios))
        ],
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": c.rope_theta, **factor},
            "compress": compress,
        },
        "max_position_embeddings": 4096,
        "attn_implementation": "eager",
    }


_PARTS = (
    ("attn.indexer.compressor.", "self_attn.compressor.indexer."),
    ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.q_norm", "self_attn.q_a_norm"),
    ("attn.", "self_attn."),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"),
    ("ffn.shared_experts.w2", "mlp.shared_experts.down_proj"),
    ("ffn.shared_experts.w3", "mlp.shared_experts.up_proj"),
    ("ffn.", "mlp."),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
)
"""How a name inside a layer begins on disk and in transformers; the first that fits."""

_LEAVES = {
    "ape": "position_bias",
    "wkv": "kv_proj",
    "wgate": "gate_proj",
    "wq_a": "q_a_proj",
    "wq_b": "q_b_proj",
    "wo_a": "o_a_proj",
    "wo_b": "o_b_proj",
    "norm": "kv_norm",
}
_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}


def _their_names(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    found = {_TOP[name]: tensors[name] for name in _TOP}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        for name, value in tensors.items():
            if name.startswith(ours) and ".experts." not in name:
                found[theirs + _in_layer(name.removeprefix(ours))] = value
        w1, w2, w3 = (
            torch.stack(
                [
                    tensors[f"{ours}ffn.experts.{e}.{w}.weight"]
                    for e in range(config.n_routed_experts)
                ]
            )
            for w in ("w1", "w2", "w3")
        )
        found[f"{theirs}mlp.experts.gate_up_proj"] = torch.cat((w1, w3), 1)
        found[f"{theirs}mlp.experts.down_proj"] = w2
    return found


def _in_layer(name: str) -> str:
    for begin, other in _PARTS:
        if name.startswith(begin):
            *path, leaf = (other + name.removeprefix(begin)).removesuffix(".weight").split(".")
            weight = ".weight" if name.endswith(".weight") else ""
            return ".".join([*path, _LEAVES.get(leaf, leaf)]) + weight
    raise KeyError(name)


def tokens(source: Any, length: int, seed: int = 0) -> list[int]:
    """A random prompt."""
    rng: NDArray[Any] = np.random.default_rng(seed).integers(0, source.config.vocab_size, length)
    return [int(token) for token in rng]
