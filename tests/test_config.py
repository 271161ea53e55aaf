"""config.json in both dialects: the published ones, and what strangers may write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_quant.config import MAX_CONFIG_BYTES, ModelConfig, parse_config, read_config
from dsv4_quant.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
HF = {p.stem: p for p in sorted(CONFIGS.glob("*.json")) if not p.stem.endswith(".inference")}
FLAT = {p.stem: p for p in sorted(CONFIGS.glob("*.inference.json"))}
REQUIRED = [
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_hash_layers",
    "num_attention_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_groups",
    "o_lora_rank", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "index_n_heads",
    "index_head_dim", "index_topk", "hc_mult", "hc_sinkhorn_iters", "sliding_window",
    "compress_ratios", "rope_theta", "compress_rope_theta", "routed_scaling_factor",
    "scoring_func", "swiglu_limit",
]  # fmt: skip


def raw(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_bytes())
    return config


def flash(**changes: Any) -> dict[str, Any]:
    return raw("V4-Flash") | changes


def refused(config: Any, *says: str) -> str:
    """Parses a config that must be refused, in one short printable paragraph."""
    with pytest.raises(ConfigError) as caught:
        parse_config(config, "some/config.json")
    text = str(caught.value)
    assert text.isprintable() and len(text) < 700 and "some/config.json" in text
    for part in says:
        assert part in text
    return text


@pytest.mark.parametrize("path", [*HF.values(), *FLAT.values()], ids=[*HF, *FLAT])
def test_every_published_config_is_read(path: Path) -> None:
    config = read_config(path)
    assert config.is_flat == (path.stem in FLAT)
    assert dict(config.raw) == json.loads(path.read_bytes())
    assert config.fp8_block == config.weight_block_size == (128, 128)
    assert config.rope_scaling is not None and config.rope_scaling.factor == 16
    hash(config)


def test_there_are_as_many_configs_as_releases() -> None:
    assert len(HF) == 6 and len(FLAT) == 3


@pytest.mark.parametrize(
    ("name", "expert_dtype", "mtp", "dspark"),
    [
        ("V4-Flash", "fp4", 1, False),
        ("V4-Flash-first-revision", None, 1, False),
        ("V4-Flash-Base", "fp8", 1, False),
        ("V4-Pro", "fp4", 1, False),
        ("V4-Flash-0731", "fp4", 3, True),
        ("V4-Pro-0813", "fp4", 3, True),
    ],
)
def test_releases(name: str, expert_dtype: str | None, mtp: int, dspark: bool) -> None:
    config = read_config(HF[name])
    assert (config.expert_dtype, config.num_mtp_blocks) == (expert_dtype, mtp)
    assert config.is_dspark == dspark and config.num_nextn_predict_layers == 1
    assert len(config.compress_ratios) == config.num_hidden_layers + mtp


@pytest.mark.parametrize("flat", sorted(FLAT))
def test_both_dialects_say_the_same(flat: str) -> None:
    ours, theirs = read_config(FLAT[flat]), read_config(HF[flat.removesuffix(".inference")])
    fields = set(ModelConfig.__dataclass_fields__) - {"raw", "is_flat", "num_nextn_predict_layers"}
    assert {f: getattr(ours, f) for f in fields} == {f: getattr(theirs, f) for f in fields}
    assert ours.num_mtp_blocks == theirs.num_mtp_blocks


def test_the_flat_dialect_says_when_nothing_is_quantised() -> None:
    flat = raw("V4-Flash.inference") | {"dtype": "bf16"}
    assert parse_config(flat).weight_block_size is None
    refused(flat | {"dtype": "fp16"}, "dtype is 'fp16'", "'fp8' or 'bf16'")


def test_other_blocks_and_the_nested_expert_dtype() -> None:
    config = flash()
    del config["expert_dtype"]
    config["quantization_config"] |= {"weight_block_size": [32, 32], "expert_dtype": "fp8"}
    parsed = parse_config(config)
    assert parsed.fp8_block == (32, 32) and parsed.expert_dtype == "fp8"
    assert parse_config(flash(quantization_config=None)).weight_block_size is None
    refused(config | {"expert_dtype": "fp4"}, "expert_dtype differs between")


def test_null_in_one_place_says_nothing() -> None:
    config = flash(expert_dtype=None)
    config["quantization_config"]["expert_dtype"] = "fp8"
    assert parse_config(config).expert_dtype == "fp8"


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    config = flash()
    del config[key]
    refused(config, f"Missing keys: {key}.")


FLAT_OPTIONAL = {
    "dtype", "scale_fmt", "expert_dtype", "beta_fast", "beta_slow", "original_seq_len", "dim",
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(set(raw("V4-Flash.inference")) - FLAT_OPTIONAL))
def test_a_missing_key_is_named_as_the_flat_dialect_spells_it(key: str) -> None:
    config = raw("V4-Flash.inference")
    del config[key]
    text = refused(config)
    assert f"Missing keys: {key}." in text or f"{key} is missing" in text


def test_wrong_values_are_named_as_the_flat_dialect_spells_them() -> None:
    config = raw("V4-Flash.inference")
    refused(config | {"dim": "x"}, "dim is 'x'")
    refused(config | {"window_size": 0}, "window_size is 0")
    refused(config | {"rope_factor": -1}, "rope_factor is -1")
    refused(config | {"original_seq_len": "64k"}, "original_seq_len is '64k'")
    refused(config | {"n_layers": 10**6}, "n_layers is 1000000")


def test_several_missing_keys_are_all_named() -> None:
    refused({"model_type": "deepseek_v4"}, "Missing keys:", "and 21 more")


@pytest.mark.parametrize("dialect", ["V4-Flash", "V4-Flash.inference"])
def test_unknown_keys_are_named(dialect: str) -> None:
    refused(raw(dialect) | {"weight_twist": 3, "more": None}, "more", "weight_twist")
    refused(raw(dialect) | {f"key{i}": 0 for i in range(5000)}, "and 4995 more")
    refused(raw(dialect) | {"x" * 100_000: 0}, "xxx...")
    refused(raw(dialect) | {"evil\x1b[2J\nkey": 0}, "evil\\x1b[2J\\nkey")


def test_unknown_keys_inside_are_named() -> None:
    config = flash()
    config["quantization_config"]["group_size"] = 16
    refused(config, "quantization_config holds unknown keys: group_size")
    config = flash()
    config["rope_scaling"]["mscale"] = 2
    refused(config, "rope_scaling holds unknown keys: mscale")


def test_fields_of_the_dataclass_are_no_keys() -> None:
    for key in ("raw", "is_flat", "weight_block_size"):
        refused(flash(**{key: 1}), f"Unknown keys: {key}")


ABSURD = [0, -1, 10**9, 10**30, 10**400, 2**63, 1.5, 1e308, True, None, "64", "", [64], {}, [[1]]]


@pytest.mark.parametrize("value", ABSURD, ids=lambda v: str(v)[:12])
@pytest.mark.parametrize("key", [k for k in REQUIRED if "theta" not in k and "factor" not in k])
def test_absurd_numbers_and_types_are_refused(key: str, value: Any) -> None:
    sound = [("num_hash_layers", 0), ("swiglu_limit", 1.5), ("swiglu_limit", 10**9)]
    if type(value) in (int, float) and (key, value) in sound:
        parse_config(flash(**{key: value}))
    else:
        refused(flash(**{key: value}), key)


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "hc_eps", "routed_scaling_factor"])
@pytest.mark.parametrize(
    "value", [0, -1.0, float("inf"), float("nan"), 1e300, 10**400, "1", None, True, [1]]
)
def test_absurd_floats_are_refused(key: str, value: Any) -> None:
    refused(flash(**{key: value}), key)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compress_ratios": [0] * 43}, "compress_ratios has 43 entries for 44 blocks"),
        ({"compress_ratios": [0] * 43 + [4]}, "compress_ratios is not 0 for an mtp block"),
        ({"compress_ratios": [0] * 2049}, "compress_ratios is a list of 2049 values: too long"),
        ({"compress_ratios": [0] * 43 + [-4]}, "compress_ratios"),
        ({"compress_ratios": [0] * 43 + [2.0]}, "compress_ratios"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok is larger"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is odd"),
        ({"qk_rope_head_dim": 514}, "qk_rope_head_dim"),
        ({"o_groups": 7}, "o_groups does not divide"),
        ({"hidden_size": 4097}, "hidden_size is odd"),
        ({"moe_intermediate_size": 2047}, "moe_intermediate_size is odd"),
        ({"n_routed_experts": 60_000}, "more than 500,000 tensors"),
        ({"num_nextn_predict_layers": 2}, "compress_ratios has 44 entries for 45 blocks"),
        ({"num_nextn_predict_layers": 65}, "num_nextn_predict_layers"),
        ({"dspark_target_layer_ids": [40]}, "compress_ratios|dspark_markov_rank"),
        ({"dspark_target_layer_ids": "40"}, "dspark_target_layer_ids"),
        (
            {"dspark_target_layer_ids": [43], "dspark_markov_rank": 1},
            "dspark_target_layer_ids names a layer that is not there",
        ),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'; this tool knows only 'sqrtsoftplus'"),
        ({"scoring_func": ["softmax"]}, "scoring_func"),
        ({"expert_dtype": "int4"}, "expert_dtype is 'int4'"),
        ({"expert_dtype": {"a": "x" * 1000}}, "expert_dtype"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', not an object"),
        ({"rope_scaling": {}}, "factor is missing"),
        ({"quantization_config": []}, "quantization_config is [], not an object"),
        ({"model_type": "deepseek_v41"}, "model_type is 'deepseek_v41'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_no_model_says_is_refused(changes: dict[str, Any], says: str) -> None:
    text = refused(flash(**changes))
    assert any(part in text for part in says.split("|"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "awq"), ("fmt", "e5m2"), ("scale_fmt", "e4m3"),
        ("weight_block_size", 128), ("weight_block_size", [128]), ("weight_block_size", [0, 128]),
        ("weight_block_size", [128, 128.0]), ("weight_block_size", [128, 1 << 40]),
        ("weight_block_size", [128, True]), ("weight_block_size", None),
    ],
)  # fmt: skip
def test_quantization_config_is_checked(key: str, value: Any) -> None:
    config = flash()
    config["quantization_config"][key] = value
    refused(config, key)


def test_both_spellings_of_the_rope_type_must_be_yarn() -> None:
    config = flash()
    config["rope_scaling"]["rope_type"] = "linear"
    refused(config, "rope_type is 'linear'")
    del config["rope_scaling"]["type"]
    config["rope_scaling"]["rope_type"] = "yarn"
    parse_config(config)


@pytest.mark.parametrize("value", [None, 3, "x", [], [{}]], ids=str)
def test_only_an_object_is_a_config(value: Any) -> None:
    refused(value, "not a JSON object")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"\x80\x04K\x01.", "not valid JSON"),
        (b'{"a":' * 2000, "nested too deeply"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' occurs twice"),
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "Unknown keys: a"),
        (b'{"rope_theta": NaN}', "NaN is not a number"),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "thousands of digits"),
        (b"[" + b"0," * 60_000 + b"0]", "more than 50,000 values"),
        (b"{}" + b" " * MAX_CONFIG_BYTES, "larger than 1 MiB"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert says in str(caught.value) and str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_config(path)


def test_deep_values_under_known_keys_are_refused() -> None:
    deep: Any = 0
    for _ in range(900):
        deep = [deep]
    for key in (
        "hidden_size",
        "compress_ratios",
        "scoring_func",
        "expert_dtype",
        "model_type",
        "rope_theta",
        "rope_scaling",
        "quantization_config",
        "dspark_target_layer_ids",
    ):
        refused(flash(**{key: deep}), key)  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    dialect=st.sampled_from(["V4-Flash-0731", "V4-Flash-0731.inference"]),
    data=st.data(),
    value=JSON,
    drop=st.booleans(),
)
def test_fuzz_a_config_is_read_or_refused(
    dialect: str, data: st.DataObject, value: Any, drop: bool
) -> None:
    config = raw(dialect)
    key = data.draw(st.sampled_from(sorted(config)))
    if drop:
        del config[key]
    else:
        config[key] = value
    try:
        parsed = parse_config(config, "config.json")
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 700
    else:
        assert isinstance(parsed, ModelConfig)
