"""hf output loads in transformers as it stands: every parameter and every logit is the source's.

Two loads show it. On a CPU transformers decodes whatever it finds, so the plain load proves the
values. A GPU builds modules from what config.json says: the structural load does that, without a
GPU, and so proves config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers import quantizer_finegrained_fp8 as quantizer

from dsv4_quant.catalogue import StoredTensor
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.formats.e2m1 import VALUES as FP4_VALUES
from dsv4_quant.model.forward import one_torch_thread
from tests.conversion.checkpoints import config, formats, write_checkpoint
from tests.folders import golden

PROMPTS = [[355, 206, 495], [int(n) for n in np.random.default_rng(0).integers(0, 512, 40)]]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with one_torch_thread():
        yield


def load(path: Path) -> Any:
    """The model in float32, which holds every stored value; nothing missing, nothing unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.float()


def logits(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]


def structural(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The state dict as a GPU would have it: codes and scales where config.json says so."""
    monkeypatch.setattr(
        quantizer.FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None
    )
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    state: dict[str, Tensor] = model.state_dict()
    return state


def decoded(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Codes times scales in float32; int8 is packed FP4, three axes are one weight per expert."""
    if scale is None:
        return weight.float()
    if weight.dtype == torch.int8:
        table = torch.from_numpy(FP4_VALUES.copy())
        codes = weight.view(torch.uint8).int()
        weight = torch.stack([table[codes & 15], table[codes >> 4]], -1).flatten(-2)
    values, scales = weight.float(), scale.float()
    for axis in (-2, -1):
        block = -(-values.shape[axis] // scales.shape[axis])
        scales = scales.repeat_interleave(block, axis).narrow(axis, 0, values.shape[axis])
    return values * scales


def same_model(path: Path, exact: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both loads give these parameters, bit for bit."""
    state = load(path).state_dict()
    assert state.keys() == exact.keys()
    assert all(torch.equal(state[key], exact[key]) for key in exact)
    with monkeypatch.context() as patch:
        held = structural(path, patch)
    scales = {key for key in held if key.endswith("_scale_inv")}
    assert held.keys() - scales == exact.keys()
    for key, value in exact.items():
        assert torch.equal(decoded(held[key], held.get(f"{key}_scale_inv")), value), key


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple[dict[str, Tensor], list[Tensor]]]:
    """Parameters and logits of both golden checkpoints."""
    found = {}
    for case in ("tiny-fp4", "tiny-base"):
        model = load(golden(case))
        found[case] = model.state_dict(), logits(model)
    return found


@pytest.mark.parametrize(
    ("case", "experts", "dense"),
    [
        ("tiny-fp4", "keep", "keep"),
        ("tiny-fp4", "keep", "bf16"),
        ("tiny-fp4", "fp8", "keep"),
        ("tiny-fp4", "fp8", "bf16"),
        ("tiny-fp4", "bf16", "keep"),
        ("tiny-fp4", "bf16", "bf16"),
        ("tiny-base", "keep", "keep"),
        ("tiny-base", "keep", "bf16"),
        ("tiny-base", "bf16", "keep"),
        ("tiny-base", "bf16", "bf16"),
    ],
)
def test_every_mixture_is_the_same_model(
    case: str,
    experts: Any,
    dense: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference: dict[str, tuple[dict[str, Tensor], list[Tensor]]],
) -> None:
    convert(golden(case), tmp_path / "out", Request("hf", 1, experts, dense))
    exact, expected = reference[case]
    same_model(tmp_path / "out", exact, monkeypatch)
    found = logits(load(tmp_path / "out"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", ["tiny-fp4", "tiny-base"])
def test_back_from_rank_files(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference: dict[str, tuple[dict[str, Tensor], list[Tensor]]],
) -> None:
    convert(golden(case), tmp_path / "ranks", Request("mp", 2))
    for name in ("config.json", "inference/config.json"):  # both, then the flat one alone
        out = tmp_path / name.replace("/", "-")
        convert(tmp_path / "ranks", out, Request("hf"))
        same_model(out, reference[case][0], monkeypatch)
        (tmp_path / "ranks" / "config.json").unlink(missing_ok=True)
    found = logits(load(out))
    assert all(torch.equal(a, b) for a, b in zip(found, reference[case][1], strict=True))


def test_wo_a_may_stay_bf16_between_fp8_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the repacks that inference engines use; and then no published config says so."""

    def calm(tensor: StoredTensor, rng: np.random.Generator) -> NDArray[Any] | None:
        return np.full(tensor.shape, 120, np.uint8) if tensor.dtype == "F8_E8M0" else None

    raw = config(expert_dtype="fp8")
    raw["quantization_config"]["modules_to_not_convert"] = ["layers.0.attn.wo_a", "head"]
    write_checkpoint(tmp_path / "src", raw, formats("fp8", wo_a="bf16"), values=calm)
    exact = load(tmp_path / "src").state_dict()
    convert(tmp_path / "src", tmp_path / "out", Request("hf"))
    same_model(tmp_path / "out", exact, monkeypatch)
    said = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert said["quantization_config"]["modules_to_not_convert"] == [
        "layers.0.attn.wo_a",
        "layers.1.attn.wo_a",
        "mtp.0.attn.wo_a",
        "head",
    ]
    assert said["expert_dtype"] == "fp8"
