"""Every cast is exact, or refused with the tensor and the place named; then nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dsv4_quant.catalogue import Formats, StoredTensor
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import Dsv4Error, NotANumberError, UsageError, ValueNotExactError
from dsv4_quant.formats import bf16, e2m1, e4m3
from dsv4_quant.formats.blocks import FP4, fp8
from tests.conversion.checkpoints import (
    config,
    digests,
    formats,
    wild,
    write_checkpoint,
)

ONE_LAYER: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_nextn_predict_layers": 0,
    "compress_ratios": [0],
    "n_routed_experts": 2,
    "moe_intermediate_size": 256,
    "vocab_size": 64,
}
W2 = "layers.0.ffn.experts.1.w2.weight"
"""128 x 256: a row of two tiles."""

Array = NDArray[Any]
Edit = Callable[[Array], None]


def calm(tensor: StoredTensor, rng: np.random.Generator) -> Array:
    """Like wild, with all scales near 2^-7: no format loses a value of another that holds it."""
    if not tensor.is_scale:
        return wild(tensor, rng)
    exponents = rng.integers(118, 123, tensor.shape)
    if tensor.dtype == "F8_E8M0":
        return exponents.astype(np.uint8)
    return np.ldexp(1.0, exponents - 127).astype(np.float32)


def source(root: Path, forms: Any = None, *, empty: bool = False, **edits: Edit) -> Path:
    """One layer; ``edits``: tensor name with _ for . -> changes the array of calm values.

    ``empty`` experts are zeros, which every format holds.
    """
    wanted = dict(edits)

    def values(tensor: StoredTensor, rng: np.random.Generator) -> Array:
        array = calm(tensor, rng)
        if empty and tensor.spec.expert is not None and not tensor.is_scale:
            array[:] = 0
        edit = wanted.pop(tensor.name.replace(".", "_"), None)
        if edit is not None:
            edit(array)
        return array

    held = (forms or formats()).experts.kind
    raw = config(**ONE_LAYER, expert_dtype=None if held == "bf16" else held)
    write_checkpoint(root / "src", raw, forms, values=values)
    assert not wanted, "no such tensor"
    return root / "src"


def refused(root: Path, request: Request, error: type[Dsv4Error], tensor: str, *words: str) -> None:
    with pytest.raises(error) as caught:
        convert(root / "src", root / "out", request, workers=2)
    assert caught.value.tensor == tensor
    for word in words:
        assert word in caught.value.what
    assert not (root / "out").exists()


def accepted(root: Path, request: Request) -> Path:
    report = convert(root / "src", root / "out", request, workers=2)
    found = digests(root / "out")
    assert found == digests(root / "src")
    assert {name: record.digest for name, record in report.manifest.tensors.items()} == found
    return root / "out"


def put(place: Any, value: Any) -> Edit:
    def edit(array: Array) -> None:
        array[place] = value

    return edit


def fp4_tile(root: Path, codes: int, low: int, high: int) -> None:
    """A source whose second w2 tile has one block of one code, and all scales but its own high."""

    def edit_codes(array: Array) -> None:
        array[:, 64:] = 0x22
        array[5, 64:80] = codes | codes << 4

    def edit_scales(array: Array) -> None:
        array[:, 4:] = high
        array[5, 4] = low

    source(
        root,
        layers_0_ffn_experts_1_w2_weight=edit_codes,
        layers_0_ffn_experts_1_w2_scale=edit_scales,
    )


FP8, MP = Request("hf", 1, "fp8"), Request("mp", 2, "fp8")


class TestFp4ToFp8:
    @pytest.mark.parametrize(
        ("code", "spread"),
        [(1, 14), (3, 14), (1, 15), (3, 15), (2, 15), (7, 15), (2, 16), (4, 16), (7, 17), (6, 17)],
    )
    def test_the_bound_is_what_e4m3_holds(self, code: int, spread: int, tmp_path: Path) -> None:
        value = np.ldexp(e2m1.VALUES[code], 6 - spread)
        fp4_tile(tmp_path, code, 120 - spread, 120)
        if value in e4m3.VALUES:
            accepted(tmp_path, MP)
        else:
            place = "128x128 tile at row 0, column 128 (tile 0, 1)"
            refused(tmp_path, MP, ValueNotExactError, W2, place, f"2**{spread} apart")

    def test_underflow_of_the_scale(self, tmp_path: Path) -> None:
        fp4_tile(tmp_path, 2, 5, 5)
        place = "128x128 tile at row 0, column 128 (tile 0, 1)"
        refused(tmp_path, FP8, ValueNotExactError, W2, place, "largest scale byte, 5")

    def test_the_smallest_scale_that_does_not_underflow(self, tmp_path: Path) -> None:
        fp4_tile(tmp_path, 1, 6, 6)
        accepted(tmp_path, FP8)

    @pytest.mark.parametrize("top", [0, 3, 254])
    def test_a_tile_of_zeros_is_exact_under_any_scale(self, top: int, tmp_path: Path) -> None:
        source(
            tmp_path,
            layers_0_ffn_experts_1_w2_weight=put(np.s_[:, 64:], 0x80),
            layers_0_ffn_experts_1_w2_scale=put(np.s_[:, 4:], top),
        )
        out = accepted(tmp_path, FP8)
        with Checkpoint.open(out) as held:
            tensor = held.read(W2)
        assert tensor.scales is not None
        assert tensor.scales[0, 1] == max(top - 6, 0)
        assert not tensor.codes[:, 128:].any()

    @pytest.mark.parametrize("code", [0, 7])
    def test_a_scale_that_is_nan_names_the_tile(self, code: int, tmp_path: Path) -> None:
        fp4_tile(tmp_path, code, 255, 120)
        refused(tmp_path, MP, NotANumberError, W2, "0xFF", "row 0, column 128")

    def test_certificate_counts_tiles_and_spreads(self, tmp_path: Path) -> None:
        fp4_tile(tmp_path, 1, 106, 120)
        report = convert(tmp_path / "src", tmp_path / "out", FP8)
        proof = report.manifest.certificate["fp4_to_fp8"]
        assert (proof.tensors, proof.tiles) == (6, 12)
        assert sum(proof.spreads.values()) == 12
        assert max(proof.spreads) == 14
        assert proof.worst == f"{W2} tile 0, 1"


class TestToBf16:
    REQUEST = Request("hf", 1, "bf16", "bf16")

    @pytest.mark.parametrize(
        ("code", "scale", "fits"),
        [(1, 0, True), (7, 252, True), (7, 253, False), (5, 253, True), (3, 254, True),
         (4, 254, False), (0, 254, True)],
    )  # fmt: skip
    def test_fp4_at_the_extremes(self, code: int, scale: int, fits: bool, tmp_path: Path) -> None:
        source(
            tmp_path,
            layers_0_ffn_experts_1_w2_weight=put((5, slice(16, 32)), [0, code << 4] + 14 * [0]),
            layers_0_ffn_experts_1_w2_scale=put((5, 1), scale),
        )
        if fits:
            out = accepted(tmp_path, self.REQUEST)
            with Checkpoint.open(out) as held:
                found = bf16.decode(held.read(W2).codes)[5, 35]
            assert found == np.ldexp(np.float64(e2m1.VALUES[code]), scale - 127)
        else:
            place = "row 5, column 35"
            refused(tmp_path, self.REQUEST, ValueNotExactError, W2, place, "range of BF16")

    @pytest.mark.parametrize(
        ("code", "scale", "fits"),
        [(0x01, 3, True), (0x01, 2, False), (0x02, 2, True), (0x08, 0, True), (0x09, 0, False),
         (0x7E, 246, True), (0x7E, 247, False), (0xFD, 247, False), (0x77, 247, True)],
    )  # fmt: skip
    def test_fp8_at_the_extremes(self, code: int, scale: int, fits: bool, tmp_path: Path) -> None:
        def edit(array: Array) -> None:
            array[:] = 0
            array[3, 77] = code

        source(tmp_path, layers_0_attn_wo_a_weight=edit, layers_0_attn_wo_a_scale=put(0, scale))
        request, name = Request("mp"), "layers.0.attn.wo_a.weight"
        value = np.ldexp(np.float64(e4m3.VALUES[code]), scale - 127)
        if fits:
            out = accepted(tmp_path, request)
            with Checkpoint.open(out) as held:
                assert bf16.decode(held.read(name).codes)[3, 77] == value
        else:
            refused(tmp_path, request, ValueNotExactError, name, "row 3, column 77")

    @pytest.mark.parametrize("scale", [1.5, 3e-5, 1e-45, 3e38])
    def test_f32_scales_that_bf16_cannot_follow(self, scale: float, tmp_path: Path) -> None:
        forms = formats("fp8", scale="f32")
        source(
            tmp_path,
            forms,
            layers_0_ffn_experts_1_w2_weight=put(np.s_[:, 128:], 0x7D),
            layers_0_ffn_experts_1_w2_scale=put((0, 1), np.float32(scale)),
        )
        if scale == 1.5:  # 1.5 * 416 has five bits
            accepted(tmp_path, self.REQUEST)
        else:
            place = "row 0, column 128"
            refused(tmp_path, self.REQUEST, ValueNotExactError, W2, place)

    def test_any_f32_scale_passes_through(self, tmp_path: Path) -> None:
        def edit(array: Array) -> None:
            array[0] = (1e-40, 3.3e38)

        source(tmp_path, formats("fp8", scale="f32"), layers_0_ffn_experts_1_w2_scale=edit)
        accepted(tmp_path, Request("hf"))


class TestToFp4:
    REQUEST = Request("hf", 1, "fp4")

    @pytest.mark.parametrize("held", ["fp8", "bf16"])
    def test_a_value_off_the_grid_is_refused(self, held: str, tmp_path: Path) -> None:
        one, more = (0x38, 0x3A) if held == "fp8" else (0x3F80, 0x3FA0)  # 1 and 1.25

        def edit(array: Array) -> None:
            array[7, 64:96] = one
            array[7, 77] = more

        source(tmp_path, formats(held), empty=True, layers_0_ffn_experts_1_w2_weight=edit)
        place = "1x32 tile at row 7, column 64 (tile 7, 2)"
        refused(tmp_path, self.REQUEST, ValueNotExactError, W2, place)

    def test_the_shape_must_have_whole_blocks(self, tmp_path: Path) -> None:
        raw = config(**ONE_LAYER | {"moe_intermediate_size": 144}, expert_dtype="fp8")
        write_checkpoint(tmp_path / "src", raw, formats("fp8"))
        with pytest.raises(UsageError, match=r"whole blocks of 32.*moe_intermediate_size \(144\)"):
            convert(tmp_path / "src", tmp_path / "out", self.REQUEST)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block", [(128, 48), (128, 16)])
def test_fp4_blocks_must_fit_the_tiles(block: tuple[int, int], tmp_path: Path) -> None:
    quantization = config()["quantization_config"] | {"weight_block_size": list(block)}
    raw = config(**ONE_LAYER, quantization_config=quantization)
    write_checkpoint(tmp_path / "src", raw, Formats(FP4, fp8(block), fp8(block)))
    with pytest.raises(UsageError, match=f"do not fit FP8 blocks of {block[1]}"):
        convert(tmp_path / "src", tmp_path / "out", FP8)
    accepted(tmp_path, Request("hf"))


class TestRoundTrips:
    @pytest.mark.parametrize("through", ["fp8", "bf16"])
    def test_fp4_there_and_back(self, through: Any, tmp_path: Path) -> None:
        source(tmp_path)
        there, back = tmp_path / "there", tmp_path / "back"
        convert(tmp_path / "src", there, Request("hf", 1, through))
        convert(there, back, Request("hf", 1, "fp4"))
        assert digests(there) == digests(back) == digests(tmp_path / "src")

    @pytest.mark.parametrize("scale", ["e8m0", "f32"])
    def test_fp8_there_and_back(self, scale: Any, tmp_path: Path) -> None:
        source(tmp_path, formats("fp8", scale=scale))
        there, back = tmp_path / "there", tmp_path / "back"
        convert(tmp_path / "src", there, Request("hf", 1, "bf16"))
        convert(there, back, Request("hf", 1, "fp8"))
        assert digests(there) == digests(back) == digests(tmp_path / "src")

    def test_bf16_to_fp8_refuses_what_one_scale_cannot_hold(self, tmp_path: Path) -> None:
        def edit(array: Array) -> None:
            array[0, 128] = 0x3F80
            array[127, 255] = 0x3F81  # 1 + 2^-7

        source(tmp_path, formats("bf16"), empty=True, layers_0_ffn_experts_1_w2_weight=edit)
        place = "128x128 tile at row 0, column 128 (tile 0, 1)"
        refused(tmp_path, FP8, ValueNotExactError, W2, place)


NANS: dict[str, tuple[str, Edit, str]] = {
    "bf16": ("embed.weight", put((9, 3), 0x7FC1), "rows 0..63"),
    "f32": ("hc_head_fn", put((1, 3), np.nan), "rows 0..3"),
    "f32 vector": ("layers.0.attn.attn_sink", put(2, np.nan), "rows 0..0"),
    "fp8 code": ("layers.0.attn.wq_a.weight", put((7, 7), 0xFF), "rows 0..127"),
    "fp8 scale": ("layers.0.attn.wkv.scale", put((0, 0), 0xFF), "rows 0..63"),
    "fp4 scale": ("layers.0.ffn.experts.0.w1.scale", put((200, 1), 0xFF), "rows 0..255"),
    "wo_a code": ("layers.0.attn.wo_a.weight", put((255, 100), 0x7F), "row 255, column 100"),
}


@pytest.mark.parametrize("kind", NANS)
def test_nan_is_refused_and_named_wherever_it_is(kind: str, tmp_path: Path) -> None:
    name, edit, where = NANS[kind]
    source(tmp_path, **{name.replace(".", "_"): edit})
    weight = name.replace(".scale", ".weight")
    refused(tmp_path, Request("mp"), NotANumberError, weight, where)


def test_nan_in_the_casts_to_fp4_and_bf16(tmp_path: Path) -> None:
    source(tmp_path, formats("fp8"), layers_0_ffn_experts_1_w2_weight=put((99, 200), 0x7F))
    place = "row 99, column 200"
    refused(tmp_path, Request("hf", 1, "bf16"), NotANumberError, W2, place)
    refused(tmp_path, Request("hf", 1, "fp4"), NotANumberError, W2, place)


def test_code_eight_becomes_plus_zero_in_fp8_and_stays_in_fp4(tmp_path: Path) -> None:
    source(tmp_path, layers_0_ffn_experts_1_w2_weight=put((0, 0), 0x88))
    convert(tmp_path / "src", tmp_path / "fp8", FP8)
    convert(tmp_path / "src", tmp_path / "fp4", Request("mp"))
    with Checkpoint.open(tmp_path / "fp8") as eight, Checkpoint.open(tmp_path / "fp4") as four:
        assert not eight.read(W2).codes[0, :2].any()
        assert four.read(W2).codes[0, 0] == 0x88
    assert digests(tmp_path / "fp8") == digests(tmp_path / "fp4")


def test_wild_values_go_through_every_exact_road(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", config(), seed=9)
    for number, request in enumerate(
        [Request("hf"), Request("mp", 2), Request("mp", 2, "fp8"), Request("hf", 1, "fp8")]
    ):
        convert(tmp_path / "src", tmp_path / f"out{number}", request)
        assert digests(tmp_path / f"out{number}") == digests(tmp_path / "src")
