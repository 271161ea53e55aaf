"""The plan: what cannot be done is refused before any work, and its figures are true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.catalogue import Catalogue, published_formats
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.config import parse_config
from dsv4_quant.conversion.budget import LEAST_VALUES, VALUE_BYTES, budget
from dsv4_quant.conversion.configs import config_json, inference_config_json
from dsv4_quant.conversion.plan import make_plan
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.conversion.summary import plan_conversion
from dsv4_quant.errors import DiskSpaceError, UsageError
from tests.conversion.checkpoints import config, formats, tree, write_checkpoint, write_hollow
from tests.conversion.conftest import REPOSITORY, Disk
from tests.folders import INDEX, golden

CONFIGS = REPOSITORY / "tests" / "configs"
RELEASES = ["V4-Flash", "V4-Flash-0731", "V4-Flash-Base", "V4-Pro", "V4-Pro-0813"]

FINE = {
    "n_routed_experts": 6,
    "num_attention_heads": 6,
    "index_n_heads": 6,
    "head_dim": 128,
    "index_head_dim": 128,
    "o_groups": 6,
    "vocab_size": 384,
}
"""Everything can be divided by 1, 2, 3 and 6."""


class TestGpuCounts:
    @pytest.mark.parametrize(
        ("change", "words", "possible"),
        [
            ({"n_routed_experts": 4}, r"n_routed_experts \(4\)", "1, 2"),
            ({"num_attention_heads": 12, "o_groups": 4}, r"o_groups \(4\)", "1, 2"),
            ({"vocab_size": 256}, r"vocab_size \(256\)", "1, 2"),
            ({"index_n_heads": 8}, r"index_n_heads \(8\)", "1, 2"),
            ({"head_dim": 64}, r"blocks of 128 along axis 0 of attn\.wq_b\.weight \(3\)", "1, 3"),
        ],
    )
    def test_an_impossible_one_is_refused_and_the_possible_ones_named(
        self, change: dict[str, Any], words: str, possible: str, tmp_path: Path
    ) -> None:
        source = write_hollow(tmp_path / "src", config(**FINE | change))
        with pytest.raises(UsageError, match=rf"{words}.*Possible GPU counts: {possible}\."):
            convert(source, tmp_path / "out", Request("mp", 6))
        assert not (tmp_path / "out").exists()
        for gpus in map(int, possible.split(", ")):
            make_plan(Checkpoint.open(source), Request("mp", gpus))

    @pytest.mark.parametrize("gpus", [0, -1, 5, 1 << 40])
    def test_absurd_ones(self, gpus: int, tmp_path: Path) -> None:
        source = write_hollow(tmp_path / "src", config(**FINE))
        with pytest.raises(UsageError, match="Possible GPU counts: 1, 2, 3, 6"):
            plan_conversion(source, tmp_path / "out", Request("mp", gpus))

    def test_hf_is_not_split(self) -> None:
        with pytest.raises(UsageError, match="not split"):
            Request("hf", 2)


class TestFigures:
    @pytest.mark.parametrize(
        "request_", [Request("mp", 4, "fp8"), Request("hf", 1, "bf16", "bf16"), Request("hf")]
    )
    def test_files_and_bytes(self, request_: Request, tmp_path: Path) -> None:
        planned = plan_conversion(golden("tiny-fp4"), tmp_path / "out", request_)
        assert not (tmp_path / "out").exists()
        convert(golden("tiny-fp4"), tmp_path / "out", request_)
        found = {
            path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
        }
        assert planned.files == found
        assert planned.bytes == sum(found.values())
        everything = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
        assert everything < planned.disk_needed < everything + (1 << 20)

    def test_as_much_disk_as_it_says_is_enough(self, tmp_path: Path, disk: Disk) -> None:
        request, out = Request("mp", 2, "fp8"), disk.place / "out"
        needed = plan_conversion(golden("tiny-fp4"), out, request).disk_needed
        disk.resize(needed - 4096)
        planned = plan_conversion(golden("tiny-fp4"), out, request)
        assert (planned.disk_needed, planned.fits) == (needed, False)
        with pytest.raises(DiskSpaceError):
            convert(golden("tiny-fp4"), out, request)
        assert not list(disk.place.iterdir())
        disk.resize(needed)
        convert(golden("tiny-fp4"), out, request)
        assert plan_conversion(golden("tiny-fp4"), out, request).fits  # it may be made again there

    def test_formats_operations_and_exactness(self, tmp_path: Path) -> None:
        planned = plan_conversion(golden("tiny-fp4"), tmp_path, Request("mp", 2, "fp8"))
        assert planned.formats == {
            "experts": "fp8 128x128 e8m0",
            "dense": "fp8 128x128 e8m0",
            "wo_a": "bf16",
        }
        assert planned.operations["fp4_to_fp8"] == 6 * 8 * 3
        assert planned.operations["fp8_to_bf16"] == 6
        assert planned.exactness.keys() == planned.operations.keys()

    @pytest.mark.parametrize("place", [".", "out"])
    def test_a_plan_refuses_an_out_that_convert_refuses(self, place: str, tmp_path: Path) -> None:
        source = write_hollow(tmp_path / "src", config())
        with pytest.raises(UsageError, match="inside one another"):
            plan_conversion(source, source / place, Request("hf"))


class TestMemory:
    def test_less_than_anything_could_do_with(self, tmp_path: Path) -> None:
        source = write_hollow(tmp_path / "src", config())
        with pytest.raises(UsageError, match=r"64 MiB is too little.*at least \d+ MiB"):
            convert(source, tmp_path / "out", Request("hf"), max_memory=64 << 20)
        assert not (tmp_path / "out").exists()

    def test_the_promise_holds_the_widest_weights(self, tmp_path: Path) -> None:
        """A panel of V4-Pro's main_proj is 128 rows of 21,504 values, more than LEAST_VALUES."""
        raw = config(hidden_size=1 << 14)
        with Checkpoint.open(write_hollow(tmp_path / "src", raw)) as source:
            plan = make_plan(source, Request("hf"))
        for workers in (1, 2, 8):
            for max_memory in (256 << 20, 1 << 30, 1 << 40):
                limits = budget(plan, workers=workers, max_memory=max_memory)
                assert limits.peak_bytes <= max_memory
                assert limits.panel_values >= 128 << 14 > LEAST_VALUES
                assert limits.workers in range(1, workers + 1)
        least = budget(plan, workers=8, max_memory=256 << 20)
        assert least.workers < 8
        assert least.workers * least.panel_values * VALUE_BYTES < 256 << 20

    def test_a_weight_larger_than_the_bound_goes_through_in_ranges(self, tmp_path: Path) -> None:
        raw = config(
            vocab_size=(1 << 19) + 77,
            hidden_size=256,
            num_hidden_layers=1,
            num_hash_layers=0,
            compress_ratios=[0],
            num_nextn_predict_layers=0,
        )
        source = write_hollow(tmp_path / "src", raw)
        bound = 256 << 20
        with Checkpoint.open(source) as held:
            assert held.specs["embed.weight"].shape[0] * 512 > bound
        script = f"""
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
convert({str(source)!r}, {str(tmp_path / "out")!r}, Request("hf", 1, "fp8"), max_memory={bound})
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        peak = int(done.stdout.split()[1]) << 10
        assert peak < bound, f"{peak >> 20} MiB"


class TestSmallFiles:
    @pytest.mark.parametrize("name", ["V4-Flash", "V4-Flash-0731", "V4-Pro-0813"])
    def test_the_inference_config_is_the_published_one(self, name: str) -> None:
        parsed = parse_config(json.loads((CONFIGS / f"{name}.json").read_bytes()))
        made = json.loads(inference_config_json(parsed, published_formats(parsed)))
        assert made == json.loads((CONFIGS / f"{name}.inference.json").read_bytes())

    def test_it_leaves_expert_dtype_out_for_fp8_as_the_published_readme_says(self) -> None:
        parsed = parse_config(json.loads((CONFIGS / "V4-Flash.json").read_bytes()))
        made = json.loads(inference_config_json(parsed, formats("fp8")))
        assert "expert_dtype" not in made
        assert made["dtype"] == "fp8"

    @pytest.mark.parametrize("name", RELEASES)
    def test_a_config_that_is_right_stays_as_it_is(self, name: str) -> None:
        text = (CONFIGS / f"{name}.json").read_bytes()
        catalogue = Catalogue(parse_config(json.loads(text)), formats_of(name))
        made = json.loads(config_json(catalogue, "hf"), object_pairs_hook=list)
        assert made == json.loads(text, object_pairs_hook=list)  # the order, too

    def test_the_first_revision_gets_what_it_lacks_at_its_published_place(self) -> None:
        first = json.loads((CONFIGS / "V4-Flash-first-revision.json").read_bytes())
        later = json.loads((CONFIGS / "V4-Flash.json").read_bytes(), object_pairs_hook=list)
        catalogue = Catalogue(parse_config(first), formats())
        assert json.loads(config_json(catalogue, "hf"), object_pairs_hook=list) == later

    @pytest.mark.parametrize("name", RELEASES)
    def test_the_flat_config_alone_gives_the_same_tensors(self, name: str) -> None:
        parsed = parse_config(json.loads((CONFIGS / f"{name}.json").read_bytes()))
        forms = formats_of(name)
        flat = parse_config(json.loads(inference_config_json(parsed, forms)))
        assert Catalogue(flat, forms).specs == Catalogue(parsed, forms).specs

    def test_shards_and_index_are_laid_out_as_published(self, tmp_path: Path) -> None:
        raw = config(num_hidden_layers=3, compress_ratios=[0, 4, 128, 0])
        source = write_checkpoint(tmp_path / "src", raw, shard=lambda tensor: len(tensor.name) % 3)
        convert(source, tmp_path / "out", Request("hf"))
        index = json.loads((tmp_path / "out" / INDEX).read_bytes())
        shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
        assert shards == [f"model-{n:05d}-of-00006.safetensors" for n in range(1, 7)]
        assert sorted(set(index["weight_map"].values())) == shards
        for name, shard in index["weight_map"].items():
            number = int(shard.split("-")[1])
            if name == "embed.weight":
                assert number == 1
            elif name.startswith("layers."):
                assert number == 2 + int(name.split(".")[1])
            else:
                assert number == (6 if name.startswith("mtp.") else 5)
        headers = 0
        for shard in shards:
            raw_size = (tmp_path / "out" / shard).read_bytes()[:8]
            headers += 8 + int.from_bytes(raw_size, "little")
        total = sum((tmp_path / "out" / shard).stat().st_size for shard in shards)
        assert index["metadata"]["total_size"] == total - headers
        assert list(index["weight_map"]) == sorted(index["weight_map"])

    def test_what_an_output_says_of_itself_is_reproducible(self, tmp_path: Path) -> None:
        for out in ("a", "b"):
            convert(golden("tiny-fp4"), tmp_path / out, Request("mp", 2, "fp8"), workers=3)
        assert tree(tmp_path / "a") == tree(tmp_path / "b")
        sums = subprocess.run(
            ["sha256sum", "-c", "--strict", "SHA256SUMS"],
            cwd=tmp_path / "a",
            capture_output=True,
            text=True,
            check=True,
        )
        assert sums.stdout.count(": OK\n") == len(tree(tmp_path / "a")) - 1


def formats_of(name: str) -> Any:
    return formats("fp8", scale="f32") if name == "V4-Flash-Base" else formats()
