"""The casts of every twin, in integer arithmetic on the bits.

Triton's own float8 and bfloat16 casts differ between the interpreter and the compiler (and both
from torch) in rounding, NaN, subnormals and saturation. Integers do not: so these give the same
bits in the interpreter, on a GPU and in the definitions. A code is held in int32.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def e4m3_value(code):
    # torch: code.view(float8_e4m3fn).float()
    # A normal code has float32's layout with 3 mantissa bits and an exponent bias of 7 instead of
    # 127; a subnormal one is a multiple of 2**-9.
    magnitude = code & 0x7F
    subnormal = (magnitude.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    bits = tl.where(magnitude < 8, subnormal, (magnitude << 20) + (120 << 23))
    bits = tl.where(magnitude == 0x7F, 0x7FC00000, bits)
    return (bits | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_value(code):
    # torch: e2m1.VALUES[code]
    # As above with one mantissa bit and a bias of 1; codes 0 and 1 are 0 and 0.5.
    magnitude = code & 0x7
    subnormal = (magnitude.to(tl.float32) * 0.5).to(tl.int32, bitcast=True)
    bits = tl.where(magnitude < 2, subnormal, (magnitude << 22) + (126 << 23))
    return (bits | ((code & 0x8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def unpack_pairs(packed):
    # torch: torch.stack((packed & 15, packed >> 4), -1).flatten(-2)   [R, C] -> [R, 2 C]
    pairs = tl.join(packed & 0xF, packed >> 4)
    return tl.reshape(pairs, (packed.shape[0], 2 * packed.shape[1]))


@triton.jit
def e8m0_value(byte):
    # torch: byte.view(float8_e8m0fnu).float()
    # The byte is float32's exponent field, but for 0 (a subnormal, 2**-127) and 255 (NaN).
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 0xFF, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def scale_value(stored):
    # torch: stored if stored.dtype == float32 else stored.view(float8_e8m0fnu).float()
    return stored if stored.dtype == tl.float32 else e8m0_value(stored.to(tl.int32))


@triton.jit
def widen(x):
    # torch: x.float()   for bfloat16, the upper half of a float32, or float32
    upper = x.to(tl.int16, bitcast=True).to(tl.int32) if x.dtype == tl.bfloat16 else x
    return (upper << 16).to(tl.float32, bitcast=True) if x.dtype == tl.bfloat16 else x


@triton.jit
def round_to(x, dtype: tl.constexpr):
    # torch: x.to(dtype)   for float32 x; dtype is float32 or bfloat16
    if dtype == tl.bfloat16:
        # Half of the dropped 16 bits' unit, less one, plus the last kept bit: ties go to even.
        bits = x.to(tl.int32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, kept)
        rounded = kept.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x
    return rounded


@triton.jit
def ceil_exponent(amax_bits, TOP_BITS: tl.constexpr):
    # torch: torch.log2(amax / top).ceil()   for normal float32 numbers, given as bits
    # With exponents aligned, amax <= top iff its mantissa is not the larger one.
    exponent = (amax_bits >> 23) - (TOP_BITS >> 23)
    return exponent + ((amax_bits & 0x7FFFFF) > (TOP_BITS & 0x7FFFFF)).to(tl.int32)


@triton.jit
def nearest_code(bits, exponent, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    # torch: (x / 2**exponent).to(MINIFLOAT) without its sign   for finite x = bits.view(float32)
    # |x| = significand * 2**(max(field, 1) - 150). A code is a count of quanta: the quantum is
    # 2**-MANTISSA of the value's power of two, and from the smallest normal downwards it stays.
    # So a normal code is (own - 1) << MANTISSA plus its quanta, a subnormal one its quanta, and a
    # carry into the next power of two comes out right by itself. A float32 subnormal needs no
    # normalising: it can only become a subnormal code, whose quantum does not depend on it.
    field = (bits >> 23) & 0xFF
    significand = (bits & 0x7FFFFF) | tl.where(field > 0, 0x800000, 0)
    own = tl.maximum(field, 1) - 127 - exponent + BIAS
    # 25 drops every bit of a 24-bit significand and rounds it to 0.
    drop = tl.minimum(23 - MANTISSA + tl.maximum(1 - own, 0), 25)
    half = (tl.full(drop.shape, 1, tl.int32) << (drop - 1)) - 1
    quanta = (significand + half + ((significand >> drop) & 1)) >> drop
    return ((tl.maximum(own, 1) - 1) << MANTISSA) + quanta


@triton.jit
def quantise_groups(
    x,
    FLOOR_BITS: tl.constexpr,
    TOP_BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    SIGN: tl.constexpr,
    NAN_CODE: tl.constexpr,
):
    # torch: amax = x.abs().amax(-1).clamp_min(floor)
    # Bits of magnitudes order as the numbers do, and every NaN lies above infinity.
    bits = x.to(tl.int32, bitcast=True)  # [R, GROUP]
    amax_bits = tl.maximum(tl.max(bits & 0x7FFFFFFF, 1), FLOOR_BITS)  # [R]
    finite = amax_bits < 0x7F800000
    # torch: scales = 2**ceil(log2(amax / top)); byte = log2(scales) + 127
    exponent = ceil_exponent(amax_bits, TOP_BITS)
    scales = tl.where(finite, exponent + 127, 0xFF)
    # torch: codes = (x / scales).to(MINIFLOAT)
    magnitude = nearest_code(bits, exponent[:, None], MANTISSA, BIAS)
    codes = tl.where(bits < 0, magnitude | SIGN, magnitude)
    codes = tl.where(finite[:, None], codes, NAN_CODE)
    return codes, scales.to(tl.uint8)
