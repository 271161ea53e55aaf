"""Synthetic checkpoints: the published format, the same bytes everywhere, calm values."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from dsv4_quant.catalogue import Catalogue, published_formats
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.header import DTYPE_ORDER
from dsv4_quant.config import parse_config, read_config
from dsv4_quant.errors import ConfigError, DiskSpaceError, UsageError, WriteError
from dsv4_quant.formats import e2m1, e4m3
from dsv4_quant.formats.blocks import BF16, FP4, fp8
from dsv4_quant.progress import NoProgress
from dsv4_quant.synth_config import TINY, synthetic_catalogue
from dsv4_quant.synth_values import OCTAVES, _bell, _e4m3_pairs, _stream, generate
from dsv4_quant.synthesis import synth
from tests.folders import INDEX, golden, read_file

MODULE = importlib.import_module("dsv4_quant.synthesis")  # dsv4_quant.synthesis may be the function
CONFIGS = Path(__file__).parent / "configs"
FP8 = fp8((128, 128))
FP8_F32 = fp8((128, 128), "f32")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of every mixture of formats."""
    root = tmp_path_factory.mktemp("synth")
    wanted: dict[str, dict[str, Any]] = {
        "fp4": {},
        "fp8": {"experts": "fp8"},
        "bf16": {"experts": "bf16"},
        "base": {"config": "tiny-base"},
        "base-bf16": {"config": "tiny-base", "experts": "bf16"},
        "base-fp4": {"config": "tiny-base", "experts": "fp4"},
    }
    for name, options in wanted.items():
        synth(root / name, **options)
    return {name: root / name for name in wanted}


def sha256(folder: Path) -> str:
    """Of all weight files, by name."""
    files = sorted(folder.glob("*.safetensors"))
    sums = [f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in files]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def tensors_of(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    return {k: v for p in sorted(folder.glob("*.safetensors")) for k, v in read_file(p).items()}


# --- the same bytes everywhere -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("fp4", "0a936670a391a6b8f6c3c9a5e40c48ae8dcd60608d87ad27e5fd4dbbda914840"),
        ("fp8", "0026466e25d1c15cd0460603f2a33e7feac5490dfbee1cfcd043b88ff44fe9df"),
        ("bf16", "214c5dd1ea0c95ccbd337277429c798badb38e0c58b81d93c0669383476351bf"),
        ("base", "8203c213cfc1e66c2a53190db93a604f2659763df1144d0c0126837f1413e8ad"),
    ],
)
def test_the_bytes_are_those_of_every_other_machine(
    made: dict[str, Path], name: str, digest: str
) -> None:
    """A change here changes every synthetic checkpoint that anybody refers to by its seed."""
    assert sha256(made[name]) == digest


def test_threads_and_panels_change_no_byte(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "MAX_THREADS", 1)
    monkeypatch.setattr(MODULE, "PANEL_BYTES", 5000)
    synth(tmp_path / "out")
    assert sha256(tmp_path / "out") == sha256(made["fp4"])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 4096), st.integers(0, 4096), st.text(max_size=5))
def test_any_range_of_a_stream_is_that_part_of_it(start: int, stop: int, key: str) -> None:
    start, stop = sorted((start, stop))
    assert (_stream(key, start, stop) == _stream(key, 0, 4096)[start:stop]).all()


def test_another_seed_changes_every_weight_and_no_name(
    made: dict[str, Path], tmp_path: Path
) -> None:
    synth(tmp_path / "out", seed=-1)
    before, after = tensors_of(made["fp4"]), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    same = {name for name in before if before[name][2] == after[name][2]}
    assert all(name.endswith(".scale") for name in same)  # a block or two, of two scales each
    assert not any(".experts." in name for name in same)


def test_every_tensor_has_values_of_its_own(made: dict[str, Path]) -> None:
    contents = [data for _, _, data in tensors_of(made["fp4"]).values() if len(data) >= 64]
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_shards_move_tensors_and_change_none(
    made: dict[str, Path], tmp_path: Path, shards: int
) -> None:
    report = synth(tmp_path / "out", shards=shards)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert [p.name for p in files] == [
        f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)
    ]
    assert report.shards == shards
    assert tensors_of(tmp_path / "out") == tensors_of(made["fp4"])
    blocks = [
        {".".join(name.split(".")[:2]) for name in read_file(p) if name[:4] in ("laye", "mtp.")}
        for p in files
    ]
    assert sum(map(len, blocks)) == len(set().union(*blocks)) == 6, "a layer was cut"


# --- the published format ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "experts", "dense"),
    [
        ("fp4", FP4, FP8),
        ("fp8", FP8, FP8),
        ("bf16", BF16, FP8),
        ("base", FP8_F32, FP8_F32),
        ("base-bf16", BF16, FP8_F32),
        ("base-fp4", FP4, FP8_F32),
    ],
)
def test_formats(made: dict[str, Path], name: str, experts: object, dense: object) -> None:
    with Checkpoint.open(made[name]) as checkpoint:
        formats = checkpoint.catalogue.formats
    assert (formats.experts, formats.dense, formats.wo_a) == (experts, dense, dense)


@pytest.mark.parametrize(("name", "case"), [("fp4", "tiny-fp4"), ("base", "tiny-base")])
def test_tiny_has_the_tensors_of_the_golden_checkpoint(
    made: dict[str, Path], name: str, case: str
) -> None:
    def shapes(folder: Path) -> dict[str, Any]:
        return {key: (dtype, shape) for key, (dtype, shape, _) in tensors_of(folder).items()}

    assert shapes(made[name]) == shapes(golden(case))
    published = json.loads((golden(case) / "config.json").read_bytes())
    config = json.loads((made[name] / "config.json").read_bytes())
    assert list(config.items()) == list(published.items())


def test_safetensors_reads_the_shards_in_its_own_order(made: dict[str, Path]) -> None:
    for path in made["base"].glob("*.safetensors"):
        raw = path.read_bytes()
        assert int.from_bytes(raw[:8], "little") % 8 == 0
        held = {name: bytes(entry["data"]) for name, entry in deserialize(raw)}
        ours = read_file(path)
        assert held == {name: data for name, (_, _, data) in ours.items()}
        order = [(DTYPE_ORDER.index(dtype), name) for name, (dtype, _, _) in ours.items()]
        assert order == sorted(order)


def test_shards_follow_the_published_rule(made: dict[str, Path]) -> None:
    index = json.loads((made["fp4"] / INDEX).read_bytes())
    where = {name: int(file[6:11]) for name, file in index["weight_map"].items()}
    assert where["embed.weight"] == 1
    assert {where[name] for name in where if name.startswith("layers.3.")} == {5}
    head = ("head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")
    assert {where[name] for name in head} == {7}
    assert {where[name] for name in where if name.startswith("mtp.0.")} == {8}
    assert max(where.values()) == 8


def test_index_tells_the_truth(made: dict[str, Path]) -> None:
    text = (made["fp4"] / INDEX).read_text()
    index = json.loads(text)
    assert text == json.dumps(index, indent=2)
    held = {p.name: read_file(p) for p in made["fp4"].glob("*.safetensors")}
    assert index["weight_map"] == {t: name for name, tensors in held.items() for t in tensors}
    sizes = [len(data) for tensors in held.values() for _, _, data in tensors.values()]
    assert index["metadata"] == {"total_size": sum(sizes)}


def test_report(made: dict[str, Path], tmp_path: Path) -> None:
    seen: list[object] = []

    class Told(NoProgress):
        def total(self, count: int) -> None:
            seen.append(count)

        def advance(self, count: int) -> None:
            seen.append(count)

    report = synth(tmp_path / "out", seed=3, progress=Told())
    held = tensors_of(tmp_path / "out")
    assert report.tensors == len(held)
    assert report.bytes == sum(len(data) for _, _, data in held.values())
    assert seen[0] == report.bytes == sum(seen[1:])  # type: ignore[arg-type]
    assert (report.seed, report.experts) == (3, str(FP4))


def test_a_file_beside_the_weights(made: dict[str, Path]) -> None:
    assert json.loads((made["fp4"] / "generation_config.json").read_bytes())["eos_token_id"] == 1


# --- calm values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp4", "fp8", "bf16", "base"])
def test_every_value_is_a_number_of_sane_size(made: dict[str, Path], name: str) -> None:
    with Checkpoint.open(made[name]) as checkpoint:
        for spec in checkpoint.specs.values():
            if spec.format.kind == "i64":
                continue
            values = checkpoint.read(spec.name).decode()
            assert np.isfinite(values).all(), spec.name
            size = float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
            if spec.name.endswith("norm.weight"):
                assert values.min() >= 0.75 and values.max() <= 1.25
            elif values.size < 64 or spec.name == "embed.weight":
                assert 0.01 < size < 4, spec.name
            elif not spec.name.endswith((".ape", "gate.bias", "_base")):
                goal = spec.shape[1] ** -0.5
                goal /= 8 if spec.name.endswith(("w2.weight", "wo_b.weight")) else 1
                assert 0.5 < size / goal < 2.6, spec.name


def test_fp8_codes_are_never_nan_and_reach_both_zeros_and_the_subnormals() -> None:
    codes = np.unique(_e4m3_pairs().view(np.uint8))
    assert not set(e4m3.NAN_CODES) & set(codes.tolist())
    assert {0x00, 0x80, 0x01, 0x87}.issubset(codes.tolist())
    assert np.abs(e4m3.VALUES[codes]).max() == 240


def test_bell_is_the_bell_that_octaves_outline() -> None:
    """Every word, against the definition in floats: +-2**(octave + slot) * (1 + mantissa / 128)."""
    words = np.arange(1 << 16)
    values = (_bell(-3).astype(np.uint32) << 16).view(np.float32)
    octaves = np.array([OCTAVES[(word >> 7) & 15] for word in words])
    expected = np.ldexp(1 + (words & 127) / 128, octaves - 3) * np.where(words >> 15, -1, 1)
    assert (values == expected).all()
    assert np.sqrt(np.mean(expected**2)) * 8 == pytest.approx(1.17, abs=0.01)


def test_fp4_experts_use_every_code_and_narrow_tiles(made: dict[str, Path]) -> None:
    counts = np.zeros(16, np.int64)
    with Checkpoint.open(made["fp4"]) as checkpoint:
        for spec in checkpoint.specs.values():
            if spec.format == FP4:
                tensor = checkpoint.read(spec.name)
                assert tensor.scales is not None
                assert int(tensor.scales.max()) - int(tensor.scales.min()) <= 3
                counts += np.bincount(e2m1.unpack(tensor.codes).ravel(), minlength=16)
    assert counts.min() > 0.9 * counts.mean()


def test_real_shapes_get_the_published_scales() -> None:
    """Attention of V4-Flash: 2**-12 and 2**-11; V4-Pro's experts lie within 2**-12 ... 2**-7."""
    flash, _ = synthetic_catalogue(CONFIGS / "V4-Flash.json", None, 1)
    scales = {t.name: t for t in flash.stored("hf") if t.is_scale}
    attention = scales["layers.0.attn.wq_a.scale"]
    held = generate(attention, 0, 256, 0, attention.nbytes)
    assert set(held.tolist()) == {127 - 12, 127 - 11}
    pro, _ = synthetic_catalogue(CONFIGS / "V4-Pro.json", None, 1)
    expert = next(t for t in pro.stored("hf") if t.name == "layers.0.ffn.experts.0.w1.scale")
    held = generate(expert, 0, 384, 0, expert.nbytes)
    exponents = sorted(set((held.astype(int) - 127).tolist()))
    assert len(exponents) == 4 and set(exponents) <= set(range(-12, -6))


def test_token_ids_go_to_different_valid_experts() -> None:
    raw = {**TINY, "num_experts_per_tok": 5, "n_routed_experts": 6, "vocab_size": 60_000}
    config = parse_config(raw)
    catalogue = Catalogue(config, published_formats(config))
    table = next(t for t in catalogue.stored("hf") if t.dtype == "I64")
    ids = generate(table, 0, 6, 0, table.nbytes).view("<i8").reshape(-1, 5)
    assert ids.min() == 0 and ids.max() == 5
    assert (np.diff(np.sort(ids, axis=1)) > 0).all(), "a token goes to an expert twice"
    shares = np.array([np.bincount(column, minlength=6) for column in ids.T]) / len(ids)
    assert np.abs(shares - 1 / 6).max() < 0.01


@pytest.mark.parametrize("name", ["fp4", "fp8", "bf16", "base"])
def test_transformers_loads_it_and_its_logits_are_sane(made: dict[str, Path], name: str) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        made[name], output_loading_info=True
    )
    assert not any(info.values()), info
    ids = torch.arange(200)[None] * 37 % 512
    with torch.no_grad():
        logits = model.float()(ids).logits[0]
    assert logits.isfinite().all()
    assert 0.5 < logits.std().item() < 2  # the golden checkpoints': 1.0
    assert logits.argmax(-1).unique().numel() > 50  # not one token whatever the prompt


# --- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "size"),
    [
        ("V4-Flash", 69_187, 159_609_485_896),
        ("V4-Flash-first-revision", 69_187, 159_609_485_896),
        ("V4-Flash-Base", 69_187, 292_555_345_480),
        ("V4-Flash-0731", 72_317, 166_878_536_440),
    ],
)
def test_a_whole_release_is_what_was_published(name: str, tensors: int, size: int) -> None:
    catalogue, config = synthetic_catalogue(CONFIGS / f"{name}.json", None, None)
    held = list(catalogue.stored("hf"))
    assert (len(held), sum(tensor.nbytes for tensor in held)) == (tensors, size)
    assert json.loads(config) == json.loads((CONFIGS / f"{name}.json").read_bytes())


@pytest.mark.parametrize("layers", [1, 2, 7, 43])
@pytest.mark.parametrize("name", ["V4-Flash", "V4-Flash-0731"])
def test_the_first_layers_of_a_release(name: str, layers: int) -> None:
    whole = read_config(CONFIGS / f"{name}.json")
    catalogue, text = synthetic_catalogue(CONFIGS / f"{name}.json", None, layers)
    config = parse_config(json.loads(text))
    assert config == catalogue.config
    assert config.num_hidden_layers == layers
    assert config.num_mtp_blocks == whole.num_mtp_blocks
    assert config.compress_ratios[:layers] == whole.compress_ratios[:layers]
    assert len(config.compress_ratios) == layers + whole.num_mtp_blocks
    assert config.num_hash_layers == min(3, layers)
    if whole.is_dspark:
        assert config.dspark_target_layer_ids == tuple(range(max(0, layers - 3), layers))
    kept = {n: s.shape for n, s in catalogue.specs.items() if n.startswith("layers.0.")}
    original, _ = synthetic_catalogue(CONFIGS / f"{name}.json", None, None)
    assert kept == {n: s.shape for n, s in original.specs.items() if n.startswith("layers.0.")}


def test_a_cut_dspark_release_opens(tmp_path: Path) -> None:
    """0731's keys on a tiny model, so that three blocks fit in a test."""
    raw = {
        **TINY,
        "compress_ratios": [0, 4, 128, 4, 0, 0, 0, 0],
        "dspark_block_size": 5,
        "dspark_noise_token_id": 500,
        "dspark_target_layer_ids": [2, 3, 4],
        "dspark_markov_rank": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    synth(tmp_path / "out", config=tmp_path / "config.json", layers=2)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.specs["mtp.0.main_proj.weight"].shape == (256, 2 * 256)
        assert checkpoint.specs["mtp.2.markov_head.markov_w1.weight"].shape == (512, 32)
        assert np.isfinite(checkpoint.read("mtp.2.confidence_head.proj.weight").decode()).all()


def test_config_without_quantization_is_all_bf16(tmp_path: Path) -> None:
    raw = {k: v for k, v in TINY.items() if k not in ("quantization_config", "expert_dtype")}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    report = synth(tmp_path / "out", config=tmp_path / "config.json", layers=1)
    assert (report.experts, report.dense) == ("bf16", "bf16")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert {s.format.kind for s in checkpoint.specs.values()} == {"bf16", "f32", "i64"}


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": 0}, "Give 1 to 5"),
        ({"layers": 6}, "Give 1 to 5"),
        ({"shards": 0}, "give 1 to 8"),
        ({"shards": 9}, "give 1 to 8"),
        ({"experts": "int4"}, "fp4, fp8 or bf16"),
        ({"config": CONFIGS / "V4-Flash.inference.json"}, "the checkpoint's own config.json"),
    ],
)
def test_impossible_wishes_are_refused_before_any_work(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        synth(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_rows_that_fp4_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "moe_intermediate_size": 100}))
    with pytest.raises(UsageError, match="multiple of 32"):
        synth(tmp_path / "out", config=tmp_path / "config.json")
    synth(tmp_path / "out", config=tmp_path / "config.json", experts="fp8", layers=1)
    with Checkpoint.open(tmp_path / "out") as checkpoint:  # ragged blocks are nothing special
        assert np.isfinite(checkpoint.read("layers.0.ffn.experts.0.w2.weight").decode()).all()


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        synth(tmp_path / "out", config=tmp_path / "nowhere.json")


def test_output_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UsageError, match="not an empty folder"):
            synth(out)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10, 0, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskSpaceError, match="10 left"):
        synth(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="Not a directory"):
        synth(tmp_path / "file" / "out")


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwritev, []

    def full(fd: int, data: Any, at: int, *flags: int) -> int:
        calls.append(at)
        if len(calls) > 300:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, at, *flags)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(WriteError, match="No space left"):
        synth(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupt_leaves_nothing_and_keeps_the_users_folder(tmp_path: Path) -> None:
    class Interrupts(NoProgress):
        def advance(self, count: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth(tmp_path, progress=Interrupts())
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_without_uncached_writes(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def old(fd: int, data: Any, at: int, *flags: int) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwritev", old)
    synth(tmp_path / "out")
    assert sha256(tmp_path / "out") == sha256(made["fp4"])


def test_partial_writes_are_continued(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, data, at, *flags: real(fd, [data[0][:9999]], at, *flags)
    )
    synth(tmp_path / "out")
    assert sha256(tmp_path / "out") == sha256(made["fp4"])


def test_index_and_config_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append(Path(to).name), real(self, to))[1]
    )
    synth(tmp_path / "out", shards=2)
    assert order[-4:] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
        "config.json",
    ]
    assert sorted(order) == sorted(p.name for p in (tmp_path / "out").iterdir())
