"""BF16: every one of the 65,536 patterns, against ml_dtypes; encode only what fits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_quant.formats import bf16

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)


def test_every_pattern_decodes_as_in_ml_dtypes() -> None:
    theirs = ALL_BITS.view(ml_dtypes.bfloat16).astype(np.float32)
    assert bf16.decode(ALL_BITS).tobytes() == theirs.tobytes()  # NaN payloads included


def test_every_pattern_encodes_to_itself() -> None:
    values = bf16.decode(ALL_BITS)
    assert bf16.is_exact(values).all()
    assert np.array_equal(bf16.encode(values), ALL_BITS)


@given(st.floats(width=32, allow_nan=False))
def test_exact_means_that_the_round_trip_changes_nothing(value: float) -> None:
    array = np.array([value], np.float32)
    there_and_back = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    exact = there_and_back.tobytes() == array.tobytes()
    assert bf16.is_exact(array).tolist() == [exact]
    if exact:
        assert bf16.decode(bf16.encode(array)).tobytes() == array.tobytes()
    else:
        with pytest.raises(ValueError, match="8 significant bits"):
            bf16.encode(array)


def test_a_nan_whose_payload_would_be_cut_to_infinity_is_not_exact() -> None:
    value = np.array([0x7F800001], np.uint32).view(np.float32)
    assert not bf16.is_exact(value).any()


def test_strided_input() -> None:
    values = np.array([[1.0, 1 + 2.0**-20], [2.0, 3.0]], np.float32)
    assert bf16.is_exact(values[:, 1]).tolist() == [False, True]
    assert bf16.encode(values[:, 0]).tolist() == [0x3F80, 0x4000]
    assert bf16.decode(np.array([[0x3F80, 0], [0x4000, 0]], np.uint16)[:, 0]).tolist() == [1.0, 2.0]
