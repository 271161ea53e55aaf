"""The value digest: a hash of decoded values, the same in every format, layout and GPU count.

Definition, version 2 (1 was never released). A stranger can recompute it with numpy and a BLAKE3:

1. A weight's values are decoded to float32 (code times scale, to nearest, ties to even; a vector is
   one row, a matrix ``[R, C]``). -0 counts as +0. NaN has no digest, nor has a weight with a scale
   that is NaN or infinite: it is an error. Integers stay int64.
2. The rows are cut into leaves of P consecutive rows, the last may be shorter; P is the largest
   power of two with ``P * C <= 2**19``, at least 1.
3. A leaf's bytes are its values in the first of these forms that holds all of them exactly, in
   row-major order, little-endian. Integers are int64, 64 bits each.

   FP4, 4 bits
       if C is a multiple of 32. Every 32 columns of a row have a scale 2**s, s being the smallest
       integer from -127 on with ``max |value| <= 6 * 2**s``, or -126 where all are 0. A value is
       the code 0 to 7 of its magnitude, {0, 0.5, 1, 1.5, 2, 3, 4, 6} times the scale, plus 8 if it
       is negative. First all codes, two a byte, the even column in the low four bits; after them
       all scales, one byte ``s + 127`` each.
   BF16, 16 bits
       also infinities.
   float32, 32 bits
4. Tensor digest = BLAKE3 of ``dsv4-value-digest 2 tensor RxC\\n`` followed by, per leaf in order,
   one byte, the bits per value (4, 16, 32 or 64), and the leaf's BLAKE3 (32 bytes).
5. Model digest = BLAKE3 of ``dsv4-value-digest 2 model\\n`` followed by, per weight in ascending
   order of names (by code point), the line ``NAME DIGEST\\n`` with the tensor digest in hex.

Names are the weights' names on disk; ``.scale`` tensors are part of their weight and have none.
Leaves are independent of each other, so they can be hashed in any order and on many threads, and
each fits a core's cache. The smallest form is the cheapest: an FP4 checkpoint is hashed at a
quarter of the bytes that it would have in BF16, and hardly anything is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from blake3 import blake3

from dsv4_quant.checkpoint.canonical import Canonical
from dsv4_quant.errors import NotANumberError
from dsv4_quant.formats.blocks import Tensor

LEAF_VALUES = 1 << 19


def leaf_rows(cols: int) -> int:
    """P of the definition: rows per leaf for rows of ``cols`` values."""
    fit = LEAF_VALUES // cols
    return 1 if fit < 1 else 1 << (fit.bit_length() - 1)


@dataclass(slots=True)
class TensorDigest:
    """Collects the leaves of one weight, in any order."""

    rows: int
    cols: int
    _leaves: dict[int, bytes] = field(default_factory=dict)

    def add(self, leaf: int, bits: int, digest: bytes) -> None:
        """One leaf: its index, bits per value, and hash."""
        self._leaves[leaf] = bytes([bits]) + digest

    @property
    def is_complete(self) -> bool:
        """Whether every leaf has been added."""
        return len(self._leaves) == -(-self.rows // leaf_rows(self.cols))

    def hexdigest(self) -> str:
        """The tensor digest; every leaf must have been added."""
        assert self.is_complete, "leaves are missing"
        hasher = blake3(f"dsv4-value-digest 2 tensor {self.rows}x{self.cols}\n".encode())
        for leaf in range(len(self._leaves)):
            hasher.update(self._leaves[leaf])
        return str(hasher.hexdigest())


def model_digest(tensors: Mapping[str, str]) -> str:
    """The model digest from the tensor digests (hex) by name."""
    hasher = blake3(b"dsv4-value-digest 2 model\n")
    for name in sorted(tensors):
        hasher.update(f"{name} {tensors[name]}\n".encode())
    return str(hasher.hexdigest())


class LeafHasher:
    """Hashes panels leaf by leaf. Not shared between threads: it reuses its buffers."""

    def __init__(self) -> None:
        self._canonical = Canonical()

    def leaves(self, name: str, panel: Tensor, first_row: int) -> Iterator[tuple[int, int, bytes]]:
        """(leaf index, bits per value, hash) for each leaf of a panel of whole rows.

        ``first_row`` must be a multiple of the leaf's rows and, for quantised weights, of the
        block's. Raises NotANumberError that names the tensor and the rows.
        """
        rows, cols = panel.codes.shape[0], panel.shape[-1]
        if len(panel.shape) == 1:
            rows = 1
        step = leaf_rows(cols)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            leaf = self._canonical.leaf(panel, start, stop)
            if leaf is None:
                raise NotANumberError(
                    "A weight holds NaN (or a NaN scale) in rows"
                    f" {first_row + start}..{first_row + stop - 1}",
                    tensor=name,
                    hint="The file is damaged, or was written by a broken tool; fetch it again.",
                )
            bits, values = leaf
            yield (first_row + start) // step, bits, blake3(values.data.cast("B")).digest()
