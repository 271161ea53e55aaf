"""Finding a GPU; what PyTorch says of one that cannot be used is an error of ours, or silence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsv4_quant.errors import UsageError
from dsv4_quant.kernels import gpu_torch, ops
from dsv4_quant.kernels.gpu_torch import check_usable, find_gpu, has_gpu

TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020)."
    " Please update it. (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    gpu_torch._complaint.cache_clear()
    yield
    gpu_torch._complaint.cache_clear()


def test_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not has_gpu()
    with pytest.raises(UsageError, match="No CUDA device can be used here"):
        find_gpu()


def test_one_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch tells it: once, and then it is False and silent."""
    told = [TOO_OLD]

    def is_available() -> bool:
        while told:
            warnings.warn(told.pop(), UserWarning, stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    for _ in range(2):
        assert has_gpu()
        with pytest.raises(UsageError) as caught:
            find_gpu()
        assert str(caught.value) == (
            "No CUDA device can be used: CUDA initialization: The NVIDIA driver on your system is"
            " too old (found version 12020). Please update it. --device cpu does the same on the"
            " processor."
        )


def test_one_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_torch, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="without Triton"):
        check_usable(torch.device("cuda", 0))


def test_one_that_pytorch_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: Any) -> str:
        warnings.warn("Found GPU0 which is of compute capability 6.1", UserWarning, stacklevel=2)
        return "triton"

    monkeypatch.setattr(ops, "choose_backend", warn)
    assert check_usable(torch.device("cpu")) == torch.device("cpu")


def test_a_working_gpu_that_was_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("expandable_segments is not supported", UserWarning, stacklevel=2)
        return True

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert gpu_torch._complaint() == ""
