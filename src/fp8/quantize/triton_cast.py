"""What every Triton kernel here does to a number: measure it, scale it, round it to a code. Device functions only.

**Amax on bits.** The magnitudes of finite FP32 numbers order like their bits, and Inf and NaN lie above them. `key`
adds 0x00800000 to the magnitude bits: a finite number stays below 2^31, Inf and NaN wrap to a negative integer, so
one signed maximum over keys ignores them. A key of 0x00800000 or less means "nothing but zeros", which also pads
partial tiles. It costs a mask and one add-and-maximum for each element; there is no comparison and no floating-point
maximum to treat NaN its way.

**Scale.** `scale_bits` is the integer formula of the reference. For a power of two the exact reciprocal has the
exponent 254 - e, so x / scale is one multiplication; 2^127 is the one scale whose reciprocal is subnormal. Any other
scale divides, by IEEE division (`tl.div_rn`; a plain `/` is wrong in the last two places).

**Codes.** `cvt.rn.satfinite` rounds to nearest even and clips, but clips Inf too. For E4M3 `fma(x, 0, v)` is v for a
finite x (with its sign of zero) and NaN for any other, in one instruction; for E5M2 the Inf codes are patched in.
`tl.clamp` is left out on purpose: it turns NaN into a bound, and its other form corrupts transposed stores
(triton#11111).

**Stochastic rounding** works on the integers of t = |x / scale| in units of the last place, and Philox4x32-10 yields
four words a call, one for each of four neighbours in a row. Where a row is no multiple of four, four calls are made
and one word of each is kept: slower, the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(0x00800000)  # the key of zero


@triton.jit
def key(x):
    """An int32 for each FP32 number: ordered by magnitude when finite, negative otherwise."""
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) + 0x00800000


@triton.jit
def amax_bits(keys):
    """The FP32 bits of the finite amax that a maximum of keys stands for."""
    return tl.maximum(keys, EMPTY) - EMPTY


@triton.jit
def raise_amax(amax_ptr, bits):
    """An atomic maximum with the FP32 number at `amax_ptr`, which is not negative: its bits order like itself."""
    tl.atomic_max(amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True), bits, sem="relaxed")


@triton.jit
def scale_of(bits, E4M3: tl.constexpr, POWER: tl.constexpr):
    """The dequantizing scale (FP32) of the bits of an amax."""
    if POWER:
        TOP: tl.constexpr = (8 << 23) if E4M3 else (15 << 23)
        raised = tl.maximum(((bits + 0x1FFFFF) & 0x7F800000) - TOP, 1 << 23)
        return tl.where(bits == 0, 0x3F800000, raised).to(tl.float32, bitcast=True)
    MAX: tl.constexpr = 448.0 if E4M3 else 57344.0
    exact = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full(bits.shape, MAX, tl.float32))
    exact = tl.minimum(tl.maximum(exact, 1.1754943508222875e-38), 8.507059173023462e37)
    return tl.where(bits == 0, 1.0, exact)


@triton.jit
def factor_of(scale, POWER: tl.constexpr):
    """What `scaled` applies: the exact reciprocal of a power of two, else the scale itself, to divide by."""
    if POWER:
        bits = scale.to(tl.int32, bitcast=True)
        return tl.where(bits == 0x7F000000, 1 << 22, 0x7F000000 - bits).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def scaled(x, factor, POWER: tl.constexpr):
    """x / scale, IEEE; `factor` is broadcast to x by the caller."""
    if POWER:
        return x * factor
    return tl.div_rn(x, tl.broadcast_to(factor, x.shape))


@triton.jit
def nearest(x, v, E4M3: tl.constexpr):
    """Codes (uint8) of v, rounded to nearest even and clipped; x tells what was not finite."""
    if E4M3:
        return tl.fma(x, tl.zeros(x.shape, tl.float32), v).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    code = v.to(tl.float8e5).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    infinity = (((bits >> 24) & 0x80) | 0x7C).to(tl.uint8)
    return tl.where((bits & 0x7FFFFFFF) == 0x7F800000, infinity, code)


@triton.jit
def nearest_again(x, v, nothing):
    """`nearest` in E4M3, from conversions of its own: `nothing` is a zero that arrives at run time.

    The ptxas of CUDA 12.8 merges two conversions into one register when a 32-bit store wants them so, and then reads
    the single codes from registers that it never wrote. So the codes that are stored and those that are taken apart to
    be transposed must not come from the same instruction; a zero that the compiler knew would make them one again.
    """
    return tl.fma(x, tl.zeros(x.shape, tl.float32) + nothing, v).to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def stochastic(x, v, word, E4M3: tl.constexpr):
    """Codes (uint8) of v, rounded up where the random word falls below the fraction."""
    MANTISSA: tl.constexpr = 3 if E4M3 else 2
    LOWEST: tl.constexpr = 121 if E4M3 else 113  # biased FP32 exponent of the smallest normal code
    MAX: tl.constexpr = 448.0 if E4M3 else 57344.0
    raw = x.to(tl.int32, bitcast=True)
    magnitude = raw & 0x7FFFFFFF
    u = tl.minimum(tl.abs(v), MAX)
    exponent = tl.maximum(u.to(tl.int32, bitcast=True) >> 23, LOWEST)
    t = u * ((254 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    floor = tl.floor(t)
    threshold = ((t - floor) * 4294967296.0).to(tl.uint32)
    code = ((exponent - LOWEST) << MANTISSA) + floor.to(tl.int32) + (word < threshold).to(tl.int32)
    code = code | ((raw >> 24) & 0x80)
    if E4M3:
        code = tl.where(magnitude >= 0x7F800000, 0x7F, code)
    else:
        code = tl.where(magnitude == 0x7F800000, ((raw >> 24) & 0x80) | 0x7C, code)
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return code.to(tl.uint8)


@triton.jit
def draw(block, seed_low, seed_high, stream):
    """Philox4x32-10 of int64 block numbers: four uint32 words each. The seed's halves and the stream come as int32."""
    zero = tl.zeros(block.shape, tl.uint32)
    c0, c1 = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    k0, k1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    return tl.philox_impl(c0, c1, zero + stream.to(tl.uint32, bitcast=True), zero, zero + k0, zero + k1)


@triton.jit
def words_of(index, seed_low, seed_high, stream):
    """The random word of each int64 element index, one Philox call an element."""
    w0, w1, w2, w3 = draw(index >> 2, seed_low, seed_high, stream)
    which = (index & 3).to(tl.int32)
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def words_of_four(block, seed_low, seed_high, stream, SHAPE: tl.constexpr):
    """The random words of blocks of four neighbours: `block` int64 [..., n / 4] gives SHAPE = [..., n]."""
    w0, w1, w2, w3 = draw(block, seed_low, seed_high, stream)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), SHAPE)
