"""Functions of a row: right to a few units in the last place, and blind to the row's neighbours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_quant.model import functions

Function = Callable[[Tensor], Tensor]

PAIRS: dict[str, tuple[Function, Function]] = {
    "sigmoid": (functions.sigmoid, torch.sigmoid),
    "silu": (functions.silu, F.silu),
    "softplus": (functions.softplus, partial(F.softplus, threshold=1e9)),
    "softmax": (partial(functions.softmax, axis=-1), partial(torch.softmax, dim=-1)),
    "sum_halves": (partial(functions.sum_halves, axis=-1), partial(torch.sum, dim=-1)),
    "sum_last": (functions.sum_last, partial(torch.sum, dim=-1)),
    "rms_norm": (
        lambda x: functions.rms_norm(x, None, 1e-6),
        lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6),
    ),
}


def spread(rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + cols)
    return 20 * torch.randn(rows, cols, generator=generator)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("cols", [1, 5, 16, 33, 640])
def test_values(name: str, cols: int) -> None:
    ours, theirs = PAIRS[name]
    x = spread(40, cols)
    torch.testing.assert_close(ours(x).double(), theirs(x.double()), rtol=3e-6, atol=3e-5)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("cols", [1, 5, 16, 33, 640])
def test_a_row_alone_is_the_row_in_a_batch(name: str, cols: int) -> None:
    ours, x = PAIRS[name][0], spread(67, cols)
    whole = ours(x)
    for row in range(len(x)):
        assert torch.equal(ours(x[row : row + 1])[0], whole[row])
    assert torch.equal(ours(x[3:50]), whole[3:50])


def test_sums_along_other_axes() -> None:
    x = spread(12, 30).view(3, 4, 30)
    for axis in (0, 1, 2):
        torch.testing.assert_close(functions.sum_halves(x, axis), x.sum(axis))
        torch.testing.assert_close(functions.softmax(x, axis), x.softmax(axis))


def test_halves_in_their_order() -> None:
    """(x0 + x3) + (x1 + x4) first, the middle last: 1 would vanish in any other order."""
    big = 2.0**24
    values = torch.tensor([big, big, 1.0, -big, -big])
    assert functions.sum_halves(values, 0) == 1.0


def test_extremes_stay_finite() -> None:
    x = torch.tensor([-3e38, -1e4, -88.0, 0.0, 88.0, 1e4, 3e38])
    for function in (functions.sigmoid, functions.softplus):
        assert function(x).isfinite().all()
    assert functions.softplus(x)[-1] == x[-1] and functions.sigmoid(x)[0] == 0
    hidden = torch.tensor([[-torch.inf, 0.0]])
    assert functions.softmax(hidden, -1).tolist() == [[0.0, 1.0]]


def test_a_norm_has_a_weight() -> None:
    x, weight = spread(3, 8), torch.arange(8.0)
    expected = F.rms_norm(x, (8,), weight, eps=1e-3)
    torch.testing.assert_close(functions.rms_norm(x, weight, 1e-3), expected)
