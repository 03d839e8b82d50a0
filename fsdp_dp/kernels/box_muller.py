"""Two standard normals of four words of the keystream, in as few instructions as float64 allows on a GPU.

In the step: `chacha_normal` calls `normal_pair` for every pair of elements. The definition is `noise._radius` and
`noise._angle`; this differs from it in rounding only, by less than 1e-15 of the radius.

The release is bound by the instructions that it issues. Hence no division, no call and no branch: log and square root
start from the hardware's approximations (20 bits or more), which one cubic step makes exact to rounding; the angle is
reduced as an integer; and coefficients are arguments of the kernel, since an instruction can take a float64 from there
but not from its own code. [Note: coefficients]: bit patterns, as Triton hands Python floats over as float32.
[Note: one]: an argument that is 1, which the compiler does not know. It makes x * one + y with the multipliers, which
have time, while integer addition shares its pipe with the cipher's rotations and exclusive ors, which have none.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
import struct

import triton
import triton.language as tl

Coefficients = tuple[int, ...]

_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)

# atanh(s) / s in s^2, for |s| <= (sqrt(2) - 1) / (sqrt(2) + 1): relative error 1.3e-18 (minimax).
_ATANH = (
    1.0, 0.3333333333333367, 0.19999999999707327, 0.14285714371196215, 0.11111099286373945, 0.09091782173690154,
    0.07657025010910473, 0.07397977505563258,
)  # fmt: skip

# sin(pi f) / f and cos(pi f) in f^2, for |f| <= 1/2: errors 2e-19 and 4.2e-18 (minimax).
_SINE = (
    math.pi, -5.167712780049969, 2.5501640398772785, -0.5992645293182587, 0.08214588656284094, -0.007370430422384968,
    0.00046629943749750105, -2.1902598277121896e-05, 7.689119232957642e-07,
)  # fmt: skip
_COSINE = (
    1.0, -4.934802200544677, 4.058712126416545, -1.335262768844664, 0.23533063014598135, -0.025806888862629232,
    0.0019295568176486203, -0.0001045678067407901, 4.150749549699987e-06,
)  # fmt: skip

# Instead of a squared radius of zero, which has no reciprocal root; added to others it changes no bit.
_TINY = 2.0**-200

# High words of float64: of 2^-12 and 2^-11, whose last bits are worth 2^-64 and 2^-63, and of sqrt(1/2).
_LAST_64, _LAST_63, _ROOT_HALF = tl.constexpr(0x3F300000), tl.constexpr(0x3F400000), tl.constexpr(0x3FE6A09E)
_TWO_MINUS_11, _TWO_MINUS_32 = tl.constexpr(2.0**-11), tl.constexpr(2.0**-32)
_EXPONENT, _SIGN = tl.constexpr(0xFFF00000), tl.constexpr(0x80000000)


def coefficients(scale: float) -> tuple[Coefficients, Coefficients, Coefficients]:
    """Arguments `radius`, `cosine` and `sine` of `normal_pair`, for normals times `scale`, a power of two."""
    squared = scale * scale
    radius = (2.0**-12 - 2.0**-64, -2 * math.log(2) * 2.0**-20 * squared, _TINY, *(-4 * squared * c for c in _ATANH))
    return _bits(radius), _bits(_COSINE), _bits(_SINE)


def bits(x: float) -> int:
    """The bit pattern of a float64, as int64."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def _bits(numbers: tuple[float, ...]) -> Coefficients:
    return tuple(map(bits, numbers))


@triton.jit
def normal_pair(words, PAIR: tl.constexpr, normal):
    """Box-Muller of the words 4 * PAIR and after: signed radius, cosine and sine, whose products are scaled normals.

    The caller multiplies, as it can do so and add in one instruction. `normal` is [Note: one] and `coefficients`.
    """
    one, radius, cosine, sine = normal
    length = _radius(words[4 * PAIR], words[4 * PAIR + 1], one, radius)
    angle_low, angle_high = words[4 * PAIR + 2], words[4 * PAIR + 3]
    # To the nearest half turn, whose sign goes to the radius, and what is left: |f| <= 1/2 in half turns, rounded once.
    length = _with_high(length, _high(length) ^ ((angle_high + 0x40000000) & _SIGN))
    low = _float64(_LAST_63, angle_low) - _TWO_MINUS_11
    f = (angle_high << 1).to(tl.int32, bitcast=True).to(tl.float64) * _TWO_MINUS_32 + low
    z = f * f
    c = z * number(cosine[8]) + number(cosine[7])
    s = z * number(sine[8]) + number(sine[7])
    for i in tl.static_range(6):
        c = z * c + number(cosine[6 - i])
        s = z * s + number(sine[6 - i])
    c = z * c + 1.0
    s = z * s + number(sine[0])
    return length, c, f * s


@triton.jit
def _radius(low, high, one, coefficient):
    """`noise._radius`: sqrt(-2 ln u) times the scale, with the same u = (2^32 high + low + 1) / 2^64, rounded once.

    ln u = e ln 2 + 2 atanh(s), with s = (m - 1) / (m + 1) of a mantissa in [sqrt(1/2), sqrt(2)): where u is near 1,
    e = 0 and m - 1 is exact, so that small radii keep full relative precision.
    """
    u = high.to(tl.float64) * _TWO_MINUS_32 + (_float64(_LAST_64, low) - number(coefficient[0]))
    octaves = (_high(u) * one - _ROOT_HALF) & _EXPONENT
    mantissa = _with_high(u, _high(u) - octaves)
    below, above = mantissa - 1.0, mantissa + 1.0
    y = _approximate_reciprocal(above)
    s = below * y
    e = 1.0 - above * y
    s = s + s * (e * e + e)
    z = s * s
    p = z * number(coefficient[10]) + number(coefficient[9])
    for i in tl.static_range(6):
        p = z * p + number(coefficient[8 - i])
    e_ln_2 = octaves.to(tl.int32, bitcast=True).to(tl.float64) * number(coefficient[1]) + number(coefficient[2])
    squared = s * p + e_ln_2
    y = _approximate_reciprocal_root(squared)
    root = squared * y
    e = 1.0 - root * y
    return root + (root * e) * (e * 0.375 + 0.5)


@triton.jit
def _approximate_reciprocal(x):
    """1 / x to 20 bits; in the interpreter cut to as many."""
    if _COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1
        )
    return _cut(1.0 / x)


@triton.jit
def _approximate_reciprocal_root(x):
    """1 / sqrt(x) to 20 bits, x > 0."""
    if _COMPILED:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1
        )
    return _cut(1.0 / tl.sqrt(x))


@triton.jit
def number(bit_pattern):
    """A float64 that came as its bit pattern."""
    return bit_pattern.to(tl.float64, bitcast=True)


@triton.jit
def _cut(x):
    return (x.to(tl.uint64, bitcast=True) & 0xFFFFFFFF00000000).to(tl.float64, bitcast=True)


@triton.jit
def _high(x):
    """The word with sign and exponent of a float64."""
    return (x.to(tl.uint64, bitcast=True) >> 32).to(tl.uint32)


@triton.jit
def _with_high(x, high):
    """`x` with another high word."""
    return ((high.to(tl.uint64) << 32) | (x.to(tl.uint64, bitcast=True) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def _float64(high, low):
    """The float64 with these words: that of `high` alone, plus `low` times the value of its last bit, exactly."""
    return ((tl.full(low.shape, high, tl.uint64) << 32) | low.to(tl.uint64)).to(tl.float64, bitcast=True)
