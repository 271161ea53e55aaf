"""What the bits mean: pure functions of arrays, numpy only.

e2m1    the 16 codes of FP4, two to a byte
e4m3    the 256 codes of FP8
e8m0    the 256 scale bytes, powers of two
bf16    the upper half of a float32
blocks  a quantised weight: codes and scales, and the geometry that ties them together

These are the definitions: plain, slow, meant to be read. The fast casts in ``kernels`` are tested
against them, code by code.
"""
