"""The kernels' tests run on a GPU where there is one, else in Triton's interpreter.

The interpreter must be asked for before anything imports triton: so it is done here, at import.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    if "triton" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError(
            "something imported triton before TRITON_INTERPRET was set; set it to 1 and run again"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the operands live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    """NaN and infinities are data here; numpy, under the interpreter, must not warn of them."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        yield


@pytest.fixture(scope="session")
def same() -> Callable[[Tensor, Tensor], None]:
    """Assert that two tensors agree in dtype, shape, places of NaN, and then bit for bit."""

    def check(found: Tensor, expected: Tensor) -> None:
        found, expected = found.cpu(), expected.cpu()
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        if found.is_floating_point():
            nan = expected.isnan()
            _first(found.isnan() == nan, found, expected, "NaN differs")
            kind = {2: torch.int16, 4: torch.int32}[found.dtype.itemsize]
            equal = nan | (found.contiguous().view(kind) == expected.contiguous().view(kind))
        else:
            equal = found == expected
        _first(equal, found, expected, "bits differ")

    return check


@pytest.fixture(scope="session")
def near() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Assert that non-finite values agree and all others within a bound per element."""

    def check(found: Tensor, expected: Tensor, bound: Tensor) -> None:
        found, expected, bound = found.cpu().double(), expected.cpu().double(), bound.cpu()
        assert found.shape == expected.shape == bound.shape
        special = ~expected.isfinite()
        _first(found.isnan() == expected.isnan(), found, expected, "NaN differs")
        within = torch.where(special, found == expected, (found - expected).abs() <= bound)
        _first(within | expected.isnan(), found, expected, "out of bound")

    return check


def _first(good: Tensor, found: Tensor, expected: Tensor, what: str) -> None:
    if not bool(good.all()):
        at = tuple((~good).nonzero()[0].tolist())
        count = int((~good).sum())
        pytest.fail(f"{what} in {count}, first at {at}: {found[at]!r}, expected {expected[at]!r}")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
