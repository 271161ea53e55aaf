"""The bytes of a synthetic tensor: random, calm, and the same on every machine.

Every tensor has a random stream of its own, keyed by seed and name, of which any range can be
drawn alone; so neither threads nor shards change a byte. The stream is the raw output of PCG64,
which numpy promises never to change (that is no promise for the methods of Generator). What turns
it into weights is integer arithmetic and tables: no logarithm, no square root, nothing that
another libm or another vector unit rounds differently.

A float's sign and mantissa bits stay as drawn. Its exponent is looked up in OCTAVES, sixteen equal
chances that outline a bell with a root mean square of 1.17. Calm means: weights shrink with the
square root of the row's length, what writes to the residual streams (w2, wo_b) is damped by 8,
norms are near one. So activations keep their size through any number of layers, and logits are
sane.
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.catalogue import StoredTensor, TensorSpec

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]

OCTAVES = (+1, 0, 0, 0, 0, -1, -1, -1, -1, -1, -2, -2, -2, -3, -4, -13)
"""Power of two below each sixteenth of the values; the last makes zeros and subnormals in E4M3."""

E4M3_UNIT = 13
"""Exponent field of octave 0: values up to 240, so no code is NaN; root mean square 75."""

FLOAT_BIAS = 127
"""Exponent field of 1.0 in F32 and BF16, and the byte of 1.0 in E8M0."""

SCALES = {"fp8": (-6, 1), "fp4": (-4, 3)}
"""Exponent of the smallest scale, for rows of one value, and how many octaves scales spread.

V4-Flash's attention has 2**-12 and 2**-11 in rows of 4096, and so has its synthetic twin.
"""

DAMPING = 3
DAMPED = ("w2.weight", "wo_b.weight")

FIXED_SIZE = {"embed.weight": 0, "attn_sink": 0, "_base": -1, ".ape": -2, "gate.bias": -4}
"""Ends of the names whose size is a power of two of its own, whatever their shape."""


def generate(tensor: StoredTensor, seed: int, experts: int, start: int, stop: int) -> Bytes:
    """Bytes [start, stop) of a tensor, which must be whole rows; experts is n_routed_experts."""
    raw = _stream(f"{seed}:{tensor.name}", start, stop)
    if tensor.dtype == "I64":
        return _expert_ids(raw, tensor.shape[1], experts)
    if tensor.is_scale:
        return _scales(raw, tensor)
    if tensor.dtype == "I8":
        return raw  # a byte is two FP4 codes; all sixteen are as likely, -0 among them
    return _looked_up(raw, tensor.dtype, _table(tensor))


def _stream(key: str, start: int, stop: int) -> Bytes:
    """Bytes [start, stop) of the random stream of a key."""
    bits = np.random.PCG64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest()))
    bits.advance(start // 8)
    first = start - start % 8
    words: NDArray[np.uint64] = bits.random_raw(-(-(stop - first) // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[start - first : stop - first]


def _looked_up(raw: Bytes, dtype: str, table: Words) -> Bytes:
    """Random bytes -> floats: every 16-bit word of them, or of F32 the upper one, by a table."""
    words = (raw if raw.size % 2 == 0 else np.append(raw, np.uint8(0))).view("<u2")
    upper = words[1::2] if dtype == "F32" else words
    upper[:] = np.take(table, upper, mode="wrap")  # every word is inside; wrap skips the check
    return words.view(np.uint8)[: raw.size]


def _table(tensor: StoredTensor) -> Words:
    """The table that makes a tensor's values from random words."""
    name = tensor.name
    if tensor.dtype == "F8_E4M3":
        return _e4m3_pairs()
    if name.endswith("norm.weight"):
        return _near_one()
    if name.endswith("_scale"):
        return _positive()
    fixed = [size for end, size in FIXED_SIZE.items() if name.endswith(end)]
    return _bell(fixed[0] if fixed else -_half_log2(tensor.spec))


def _half_log2(spec: TensorSpec) -> int:
    """log2 of the square root of a row's length, rounded; more where the weight is damped."""
    return spec.shape[-1].bit_length() // 2 + (DAMPING if spec.name.endswith(DAMPED) else 0)


@cache
def _bell(octave: int) -> Words:
    """Word -> BF16 (or F32's upper half): sign and mantissa kept, the exponent from OCTAVES."""
    words = np.arange(1 << 16)
    field = FLOAT_BIAS + octave + np.array(OCTAVES)[(words >> 7) & 15]
    return np.asarray((words & 0x807F) | (field << 7), np.uint16)


@cache
def _e4m3_pairs() -> Words:
    """Word -> two E4M3 codes, each made like a BF16 in :func:`_bell`."""
    code = np.arange(1 << 8)
    field = np.maximum(E4M3_UNIT + np.array(OCTAVES)[(code >> 3) & 15], 0)
    codes = (code & 0x87) | (field << 3)
    words = np.arange(1 << 16)
    return np.asarray(codes[words & 0xFF] | (codes[words >> 8] << 8), np.uint16)


@cache
def _near_one() -> Words:
    """Word -> BF16 in 0.75 ... 1.25: 1.0 is 0x3F80, its neighbours are 1/128 above, 1/256 below."""
    steps = (np.arange(1 << 16) & 63) - 32
    return (0x3F80 + np.where(steps < 0, 2 * steps, steps)).astype(np.uint16)


@cache
def _positive() -> Words:
    """Word -> upper half of an F32 in 0.125 ... 0.5."""
    words = np.arange(1 << 16)
    return ((words & 0x7F) | (FLOAT_BIAS - 3 + ((words >> 7) & 1)) << 7).astype(np.uint16)


def _scales(raw: Bytes, tensor: StoredTensor) -> Bytes:
    """Powers of two: of each row's 32 columns one of four in FP4, of each FP8 block one of two."""
    smallest, spread = SCALES[tensor.spec.format.kind]
    byte = FLOAT_BIAS + smallest - _half_log2(tensor.spec)
    if tensor.dtype == "F8_E8M0":
        return (raw & np.uint8(spread)) + np.uint8(byte)
    exponents = (raw.view("<u4") & spread) + byte
    return (exponents << 23).astype("<u4").view(np.uint8)


def _expert_ids(raw: Bytes, chosen: int, experts: int) -> Bytes:
    """Rows of different expert ids, I64: each is drawn among those that its row has not yet."""
    draws = raw.view("<u8").reshape(-1, chosen) >> 32
    ids = np.empty(draws.shape, "<i8")
    for i in range(chosen):
        rank = ((draws[:, i] * (experts - i)) >> 32).astype(np.int64)
        for taken in np.sort(ids[:, :i], axis=1).T:
            rank += rank >= taken
        ids[:, i] = rank
    return ids.view(np.uint8).reshape(-1)
