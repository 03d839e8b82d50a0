"""The release on a GPU: ChaCha20, Box-Muller, lattice, division and cast in one pass over the local shards.

In the step: `kernels.release` comes here on CUDA devices; the torch reference is `privatize_all_in_torch_` there. Key,
counters and normals never leave registers. Element layout: [Note: layout of the field] in `fsdp_dp.noise`. A thread
makes one ChaCha20 block, that is eight normals, 128 elements apart, so that neighbouring threads read and write
neighbouring elements.

[Note: the table]. Triton hands Python floats over as float32 and compiles anew for integers that are 1 or multiples of
16, so that everything a launch needs travels in one int64 tensor: key words, release, float64 bit patterns, and one row
for each segment (a local shard, or a part of one) with addresses and ranges.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp import chacha, noise
from fsdp_dp.kernels.release import Segment
from fsdp_dp.side_stream import to_device

LANES = tl.constexpr(noise.LANES)
PAIRS = tl.constexpr(noise.PAIRS)
CHUNK = tl.constexpr(noise.CHUNK)

# What one program makes; measured on an H100 (docs/performance.md).
_CHUNKS_OF_A_PROGRAM = 1
_WARPS = 2

_EXACT = tl.constexpr(2.0**50)
_TWO_32 = tl.constexpr(2.0**32)
_TWO_MINUS_64 = tl.constexpr(2.0**-64)
_TWO_MINUS_63 = tl.constexpr(2.0**-63)
_PI = tl.constexpr(math.pi)

# [Note: the table]: places in its head, then places in a segment's row.
_RELEASE = tl.constexpr(8)
_CLAMP, _UNITS, _UNITS_OF_NOISE, _SCALE = (tl.constexpr(10 + i) for i in range(4))
_HEAD = tl.constexpr(14)
_FIRST_PROGRAM, _ACCUMULATOR, _OUT, _PARAMETER, _START, _COUNT, _WIDTH, _OFFSET, _SIZE = (
    tl.constexpr(i) for i in range(9)
)
_FIELDS = tl.constexpr(9)

_DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def privatize_all_(
    segments: Sequence[Segment], *, key: bytes, release: int, lattice: noise.Lattice, noise_std: float, divisor: float
) -> Tensor:
    """`release.privatize_all_` for one or more segments that are not empty, on a CUDA device; `noise_std` > 0.

    Returns an int32 on the device that is not zero if an element was not an exact number of lattice units. A second
    launch has then overwritten all outputs with zeros, so that nobody needs to wait for the answer.

    **Formal guarantee.** That of `noise.standard_normal` (same nonces, counters, uniforms) and of `noise.Lattice`, with
    one change in its step 1: n = floor(x), where x is clamp(S) * (1 / lambda) + 1/2 rounded once. The reciprocal is off
    by 2^-53 relative, 2^-3 where the quotient is 2^50, and the rounding of x is 2^-4 at most: less than the 1/4 that
    `noise.Lattice` allows. The output is the integer n + r(y) times spacing / divisor, rounded: post-processing.
    """
    if math.frexp(units_of_noise := noise_std / lattice.spacing)[0] != 0.5:
        raise ValueError(
            f"noise_std: found {noise_std}, expected a positive power of two times the spacing {lattice.spacing}; make "
            "the lattice with Lattice.for_release from the same noise_multiplier and max_grad_norm"
        )
    for segment in segments:
        _check(segment, release, segments[0].out.device)
    scales = (lattice.clamp, 1 / lattice.spacing, units_of_noise, lattice.spacing / divisor)
    head = [*_key_and_release(key, release), *map(_bits, scales)]
    inexact = torch.zeros(1, dtype=torch.int32, device=segments[0].out.device)
    launches = []
    for kind in dict.fromkeys(map(_kind, segments)):
        accumulator_dtype, out_dtype, columns, in_place = kind
        table, programs, count = _table(head, [segment for segment in segments if _kind(segment) == kind])
        launches.append((table, programs, count, _DTYPES[out_dtype], columns))
        _privatize[(programs,)](
            table, inexact, count, ACCUMULATOR=_DTYPES[accumulator_dtype], OUT=_DTYPES[out_dtype], COLUMNS=columns,
            CLEAR=not in_place, CHUNKS=_CHUNKS_OF_A_PROGRAM, num_warps=_WARPS,
        )  # fmt: skip
    for table, programs, count, out_dtype, columns in launches:
        _zero_if_inexact[(programs,)](
            table, inexact, count, OUT=out_dtype, COLUMNS=columns, CHUNKS=_CHUNKS_OF_A_PROGRAM, num_warps=_WARPS
        )
    return inexact


def standard_normal(
    key: bytes, *, release: int, parameter: int, start: int, count: int, device: torch.device | str = "cuda"
) -> Tensor:
    """`noise.standard_normal` on a CUDA device, in one launch; same arguments, errors and guarantee."""
    noise._check_range(release, parameter, start, count)
    normals = torch.empty(count, dtype=torch.float64, device=device)
    if count:
        segment = Segment(accumulator=normals, out=normals, parameter=parameter, start=start, count=count)
        head = [*_key_and_release(key, release), 0, 0, 0, 0]
        table, programs, _ = _table(head, [segment])
        _standard_normal[(programs,)](table, CHUNKS=_CHUNKS_OF_A_PROGRAM, num_warps=_WARPS)
    return normals


def keystream(key: bytes, nonce: chacha.Nonce, first_block: int, blocks: int, device: torch.device | str) -> Tensor:
    """`chacha.keystream` as the kernels make it: int32 [blocks, 16]. For tests; nothing else needs the bits."""
    chacha._check(key, nonce, first_block, blocks)
    words = torch.empty(blocks, chacha.WORDS_PER_BLOCK, dtype=torch.int32, device=device)
    head = torch.tensor([*struct.unpack("<8I", key), *nonce, first_block], dtype=torch.int64, device=words.device)
    if blocks:
        _keystream[(triton.cdiv(blocks, noise.LANES),)](head, words, blocks)
    return words


def _kind(segment: Segment) -> tuple[torch.dtype, torch.dtype, bool, bool]:
    """What the kernel is compiled for."""
    return segment.accumulator.dtype, segment.out.dtype, segment.columns is not None, segment.in_place


def _check(segment: Segment, release: int, device: torch.device) -> None:
    noise._check_range(release, segment.parameter, segment.start, segment.count)
    width, offset, size = segment.columns or (1, 0, 1)
    if not (offset >= 0 and size > 0 and offset + size <= width and segment.count % width == 0):
        raise ValueError(f"columns: found {segment.columns}, expected columns of rows that make up {segment.count}")
    numel = segment.count // width * size
    for name, tensor in (("accumulator", segment.accumulator), ("out", segment.out)):
        if tensor.numel() != numel or not tensor.is_contiguous() or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name}: found {tensor.dtype} {list(tensor.shape)}, expected {numel} contiguous floating-point elements"
            )
        if tensor.device != device:
            raise ValueError(f"{name}: found a tensor on {tensor.device}, expected all on {device}")


def _key_and_release(key: bytes, release: int) -> list[int]:
    if len(key) != chacha.KEY_BYTES:
        raise ValueError(f"key: found {len(key)} bytes, expected {chacha.KEY_BYTES}; make one with noise.new_key()")
    return [*struct.unpack("<8I", key), release % chacha.WORD_LIMIT, release // chacha.WORD_LIMIT]


def _bits(x: float) -> int:
    """The bit pattern of a float64, as int64."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def _table(head: Sequence[int], segments: Sequence[Segment]) -> tuple[Tensor, int, int]:
    """[Note: the table] on the device, the number of programs, and the number of segments."""
    rows, programs = list(head), 0
    for segment in segments:
        width, offset, size = segment.columns or (1, 0, 1)
        addresses = (segment.accumulator.data_ptr(), segment.out.data_ptr())
        rows += [programs, *addresses, segment.parameter, segment.start, segment.count, width, offset, size]
        chunks = -(-(segment.start + segment.count) // noise.CHUNK) - segment.start // noise.CHUNK
        programs += -(-chunks // _CHUNKS_OF_A_PROGRAM)
    table = to_device(torch.tensor(rows, dtype=torch.int64), segments[0].out.device)
    return table, programs, len(segments)


@triton.jit(do_not_specialize=["segments"])
def _privatize(
    table, inexact, segments,
    ACCUMULATOR: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr, CLEAR: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: `CHUNKS` chunks of the segment that `_find` gives, from accumulator to gradient."""
    row = _find(table, segments)
    accumulator = tl.load(row + _ACCUMULATOR).to(tl.pointer_type(ACCUMULATOR))
    out = tl.load(row + _OUT).to(tl.pointer_type(OUT))
    clamp, units = _float64(table + _CLAMP), _float64(table + _UNITS)
    units_of_noise, scale = _float64(table + _UNITS_OF_NOISE), _float64(table + _SCALE)
    chunk, begin, least, most = _range(row, CHUNKS)
    first, words = _make_words(table, row, chunk, CHUNKS)
    exact = tl.full([LANES * CHUNKS], True, tl.int1)
    for pair in tl.static_range(PAIRS):
        cosine, sine = _normal_pair(words[4 * pair], words[4 * pair + 1], words[4 * pair + 2], words[4 * pair + 3])
        for half in tl.static_range(2):
            slot = first + (2 * pair + half) * LANES
            inside = (slot >= least) & (slot < most)
            source, target = accumulator + begin + slot, out + begin + slot
            if COLUMNS:
                width, offset, size = tl.load(row + _WIDTH), tl.load(row + _OFFSET), tl.load(row + _SIZE)
                place = begin + slot
                column = place % width - offset
                inside = inside & (column >= 0) & (column < size)
                place = place // width * size + column
                source, target = accumulator + place, out + place
            total = tl.load(source, mask=inside, other=0.0).to(tl.float64)
            # Selection, not minimum and maximum: NaN stays NaN and is found below.
            total = tl.where(total > clamp, clamp, tl.where(total < -clamp, -clamp, total))
            total = tl.floor(tl.fma(total, units, 0.5))
            total += tl.floor(tl.fma(cosine if half == 0 else sine, units_of_noise, 0.5))
            exact = exact & (tl.abs(total) <= _EXACT)
            _store(target, total * scale, inside, OUT)
            if CLEAR:
                tl.store(source, tl.zeros([LANES * CHUNKS], ACCUMULATOR), mask=inside)
    tl.store(inexact, 1, mask=tl.min(exact.to(tl.int32)) == 0)


@triton.jit(do_not_specialize=["segments"])
def _zero_if_inexact(
    table, inexact, segments, OUT: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """One program: the same chunks as in `_privatize`, zeroed if any program of that launch found an inexact sum."""
    if tl.load(inexact) != 0:
        row = _find(table, segments)
        out = tl.load(row + _OUT).to(tl.pointer_type(OUT))
        _, begin, least, most = _range(row, CHUNKS)
        slot = tl.arange(0, CHUNK * CHUNKS)
        inside, place = (slot >= least) & (slot < most), begin + slot
        if COLUMNS:
            width, offset, size = tl.load(row + _WIDTH), tl.load(row + _OFFSET), tl.load(row + _SIZE)
            column = place % width - offset
            inside = inside & (column >= 0) & (column < size)
            place = place // width * size + column
        tl.store(out + place, tl.zeros([CHUNK * CHUNKS], OUT), mask=inside)


@triton.jit
def _standard_normal(table, CHUNKS: tl.constexpr):
    row = table + _HEAD
    out = tl.load(row + _OUT).to(tl.pointer_type(tl.float64))
    chunk, begin, least, most = _range(row, CHUNKS)
    first, words = _make_words(table, row, chunk, CHUNKS)
    for pair in tl.static_range(PAIRS):
        cosine, sine = _normal_pair(words[4 * pair], words[4 * pair + 1], words[4 * pair + 2], words[4 * pair + 3])
        slot = first + 2 * pair * LANES
        tl.store(out + begin + slot, cosine, mask=(slot >= least) & (slot < most))
        slot += LANES
        tl.store(out + begin + slot, sine, mask=(slot >= least) & (slot < most))


@triton.jit(do_not_specialize=["blocks"])
def _keystream(head, out, blocks):
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    counter = (block + tl.load(head + 11)).to(tl.uint32)
    nonce = _uint32(head + 8, counter), _uint32(head + 9, counter), _uint32(head + 10, counter)
    words = _chacha20(head, counter, nonce[0], nonce[1], nonce[2])
    for word in tl.static_range(16):
        tl.store(out + block * 16 + word, words[word].to(tl.int32, bitcast=True), mask=block < blocks)


@triton.jit
def _find(table, segments):
    """The row of the segment of this program: the last one whose first program is not beyond it, by bisection."""
    program = tl.program_id(0)
    low, high = segments * 0, segments
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(table + _HEAD + middle * _FIELDS + _FIRST_PROGRAM) <= program
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    return table + _HEAD + low * _FIELDS


@triton.jit
def _range(row, CHUNKS: tl.constexpr):
    """This program's first chunk; where in the shard its slot 0 is; from which of its slots to which they are inside."""
    start, count = tl.load(row + _START), tl.load(row + _COUNT)
    chunk = start // CHUNK + (tl.program_id(0) - tl.load(row + _FIRST_PROGRAM)).to(tl.int64) * CHUNKS
    begin = chunk * CHUNK - start
    least, most = tl.maximum(-begin, 0), tl.minimum(count - begin, CHUNK * CHUNKS)
    return chunk, begin, least.to(tl.int32), most.to(tl.int32)


@triton.jit
def _make_words(table, row, chunk, CHUNKS: tl.constexpr):
    """(slot 0 of, sixteen keystream words of) each of the blocks of chunks from ``chunk`` on; [Note: layout]."""
    block = tl.arange(0, LANES * CHUNKS)
    lane = block % LANES
    counter = ((chunk + block // LANES) * LANES + lane).to(tl.uint32)
    parameter = _uint32(row + _PARAMETER, counter)
    low, high = _uint32(table + _RELEASE, counter), _uint32(table + _RELEASE + 1, counter)
    return block // LANES * CHUNK + lane, _chacha20(table, counter, parameter, low, high)


@triton.jit
def _normal_pair(radius_low, radius_high, angle_low, angle_high):
    """Box-Muller of four uint32 words: `noise._radius` and `noise._angle`, equal to 1e-15 of the radius."""
    u = (radius_high.to(tl.float64) * _TWO_32 + (radius_low.to(tl.float64) + 1.0)) * _TWO_MINUS_64
    radius = tl.sqrt(tl.log(u) * -2.0)
    signed_high = angle_high.to(tl.int32, bitcast=True).to(tl.float64)
    cosine, sine = _cosine_and_sine((signed_high * _TWO_32 + angle_low.to(tl.float64)) * _TWO_MINUS_63)
    return radius * cosine, radius * sine


@triton.jit
def _cosine_and_sine(half_turns):
    """cos and sin of pi * half_turns, for |half_turns| <= 1, to two units in the last place.

    Quarter turns are split off exactly, which leaves an angle of at most pi / 4 for the polynomials of FreeBSD's
    k_cos.c and k_sin.c. The compiler's own cos and sin also provide for huge angles, by way of memory.
    """
    quarters = tl.floor(half_turns * 2.0 + 0.5)
    x = (half_turns - quarters * 0.5) * _PI
    z = x * x
    sine = z * 1.58969099521155010221e-10 - 2.50507602534068634195e-08
    sine = z * sine + 2.75573137070700676789e-06
    sine = z * sine - 1.98412698298579493134e-04
    sine = z * sine + 8.33333333332248946124e-03
    sine = z * sine - 1.66666666666666324348e-01
    sine = x + z * x * sine
    cosine = z * -1.13596475577881948265e-11 + 2.08757232129817482790e-09
    cosine = z * cosine - 2.75573143513906633035e-07
    cosine = z * cosine + 2.48015872894767294178e-05
    cosine = z * cosine - 1.38888888888741095749e-03
    cosine = z * cosine + 4.16666666666666019037e-02
    cosine = z * cosine - 0.5
    cosine = z * cosine + 1.0
    quadrant = quarters.to(tl.int32)
    odd = (quadrant & 1) != 0
    cosine, sine = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine), tl.where((quadrant & 2) != 0, -sine, sine)


@triton.jit
def _store(pointer, value, mask, OUT: tl.constexpr):
    """float64 to `OUT`, narrow formats by way of float32 as torch does it."""
    if tl.float64 == OUT:
        tl.store(pointer, value, mask=mask)
    else:
        tl.store(pointer, value.to(tl.float32).to(OUT), mask=mask)


@triton.jit
def _float64(pointer):
    """A number of the table, stored as its bit pattern."""
    return tl.load(pointer).to(tl.float64, bitcast=True)


@triton.jit
def _uint32(pointer, like):
    """A word of the table, as uint32 of the shape of `like`."""
    return tl.zeros_like(like) + tl.load(pointer).to(tl.uint32)


@triton.jit
def _chacha20(key, x12, x13, x14, x15):
    """The block function of RFC 8439 section 2.3: sixteen uint32 words; `key` points to eight words, as int64."""
    z = tl.zeros_like(x12)
    x0, x1, x2, x3 = z + 0x61707865, z + 0x3320646E, z + 0x79622D32, z + 0x6B206574
    x4, x5, x6, x7 = _uint32(key, z), _uint32(key + 1, z), _uint32(key + 2, z), _uint32(key + 3, z)
    x8, x9, x10, x11 = _uint32(key + 4, z), _uint32(key + 5, z), _uint32(key + 6, z), _uint32(key + 7, z)
    v0, v1, v2, v3, v4, v5, v6, v7 = x0, x1, x2, x3, x4, x5, x6, x7
    v8, v9, v10, v11, v12, v13, v14, v15 = x8, x9, x10, x11, x12, x13, x14, x15
    for _ in range(10):
        v0, v4, v8, v12 = _quarter_round(v0, v4, v8, v12)
        v1, v5, v9, v13 = _quarter_round(v1, v5, v9, v13)
        v2, v6, v10, v14 = _quarter_round(v2, v6, v10, v14)
        v3, v7, v11, v15 = _quarter_round(v3, v7, v11, v15)
        v0, v5, v10, v15 = _quarter_round(v0, v5, v10, v15)
        v1, v6, v11, v12 = _quarter_round(v1, v6, v11, v12)
        v2, v7, v8, v13 = _quarter_round(v2, v7, v8, v13)
        v3, v4, v9, v14 = _quarter_round(v3, v4, v9, v14)
    return (
        v0 + x0, v1 + x1, v2 + x2, v3 + x3, v4 + x4, v5 + x5, v6 + x6, v7 + x7,
        v8 + x8, v9 + x9, v10 + x10, v11 + x11, v12 + x12, v13 + x13, v14 + x14, v15 + x15,
    )  # fmt: skip


@triton.jit
def _quarter_round(a, b, c, d):
    a += b
    d = _rotate_left(d ^ a, 16)
    c += d
    b = _rotate_left(b ^ c, 12)
    a += b
    d = _rotate_left(d ^ a, 8)
    c += d
    b = _rotate_left(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _rotate_left(x, BITS: tl.constexpr):
    return (x << BITS) | (x >> (32 - BITS))
