"""The release on a GPU: ChaCha20, Box-Muller, lattice, division and cast in one pass over the local shards.

In the step: `kernels.release` comes here on CUDA devices; the torch reference is `privatize_all_in_torch_` there. Key,
counters and normals never leave registers. Element layout: [Note: layout of the field] in `fsdp_dp.noise`. A thread
makes ChaCha20 blocks, that is eight normals each, 128 elements apart, so that neighbouring threads read and write
neighbouring elements.

What is the same for all segments of a launch comes as arguments: an instruction reads them where they are, and what
follows from them alone (all of the cipher's first round but one column) is made once a program, beside the vector units.

[Note: the table]. One int64 tensor with a row for each segment (a local shard, or a part of one): addresses and ranges.
"""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp import chacha, noise
from fsdp_dp.kernels.box_muller import bits, coefficients, normal_pair, number
from fsdp_dp.kernels.release import Segment
from fsdp_dp.side_stream import to_device

LANES = tl.constexpr(noise.LANES)
PAIRS = tl.constexpr(noise.PAIRS)
CHUNK = tl.constexpr(noise.CHUNK)

# What one program makes: many chunks, so that finding its segment costs little of each.
_CHUNKS_OF_A_PROGRAM = 16
_WARPS = 2

_EXACT = tl.constexpr(2.0**50)

# Float64 numbers near this one are whole: adding to it rounds to the nearest integer.
_WHOLE = tl.constexpr(1.5 * 2.0**52)

# [Note: the table]: places in a segment's row.
_FIRST_PROGRAM, _ACCUMULATOR, _OUT, _PARAMETER, _START, _COUNT, _WIDTH, _OFFSET, _SIZE = (
    tl.constexpr(i) for i in range(9)
)
_FIELDS = tl.constexpr(9)

# Arguments that Triton shall not compile anew for.
_WORDS = [*(f"key_{i}" for i in range(8)), "release_low", "release_high", "one"]
_SCALES = ["clamp", "units", "scale"]

_DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def privatize_all_(
    segments: Sequence[Segment],
    *,
    key: bytes,
    release: int,
    lattice: noise.Lattice,
    noise_std: float,
    divisor: float,
    later: Iterable[Sequence[Segment]] = (),
) -> Tensor:
    """`release.privatize_all_` for one or more segments that are not empty, on a CUDA device; `noise_std` > 0.

    Returns an int32 on the device that is not zero if an element was not an exact number of lattice units. Last launches
    have then overwritten all outputs with zeros, also of parts before, so that nobody needs to wait for the answer.

    **Formal guarantee.** That of `noise.standard_normal` (same nonces, counters, uniforms) and of `noise.Lattice`, with
    changes in its roundings only. Step 1: n is clamp(S) * (1 / lambda), rounded once, to the nearest integer. The
    reciprocal is off by 2^-53 relative, 2^-3 where the quotient is 2^50: less than the 1/4 that is allowed. Float32 sums
    are clamped at the float32 just below the bound. Step 2: the output is n + y rounded to the nearest integer, hence
    post-processing of n + y without more ado. Step 4: y is the product of radius and cosine before any rounding, so that
    n + y is rounded once, and has far fewer ties. A tie goes to the even *output*, whatever n is: it shows nothing of n.
    The output is that integer times spacing / divisor, rounded, in narrow formats without the last two bits of that
    quotient: post-processing.
    """
    if math.frexp(units_of_noise := noise_std / lattice.spacing)[0] != 0.5:
        raise ValueError(
            f"noise_std: found {noise_std}, expected a positive power of two times the spacing {lattice.spacing}; make "
            "the lattice with Lattice.for_release from the same noise_multiplier and max_grad_norm"
        )
    words, device = _key_and_release(key, release), segments[0].out.device
    scales = [bits(x) for x in (lattice.clamp, 1 / lattice.spacing, lattice.spacing / divisor)]
    normal = coefficients(units_of_noise)
    inexact = torch.zeros(1, dtype=torch.int32, device=device)
    launches = []
    for part in itertools.chain([segments], later):
        for segment in part:
            _check(segment, release, device)
        for kind in dict.fromkeys(map(_kind, part)):
            accumulator_dtype, out_dtype, columns, in_place = kind
            table, programs, count = _table([segment for segment in part if _kind(segment) == kind])
            launches.append((table, programs, count, _DTYPES[out_dtype], columns))
            _privatize[(programs,)](
                table, inexact, count, *words, *scales, *normal, ACCUMULATOR=_DTYPES[accumulator_dtype],
                OUT=_DTYPES[out_dtype], COLUMNS=columns, CLEAR=not in_place, CHUNKS=_CHUNKS_OF_A_PROGRAM, num_warps=_WARPS,
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
        table, programs, _ = _table([segment])
        words = _key_and_release(key, release)
        _standard_normal[(programs,)](table, *words, *coefficients(1.0), CHUNKS=_CHUNKS_OF_A_PROGRAM, num_warps=_WARPS)
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
    return [*struct.unpack("<10i", key + struct.pack("<Q", release)), 1]


def _table(segments: Sequence[Segment]) -> tuple[Tensor, int, int]:
    """[Note: the table] on the device, the number of programs, and the number of segments."""
    rows: list[int] = []
    programs = 0
    for segment in segments:
        width, offset, size = segment.columns or (1, 0, 1)
        addresses = (segment.accumulator.data_ptr(), segment.out.data_ptr())
        rows += [programs, *addresses, segment.parameter, segment.start, segment.count, width, offset, size]
        chunks = -(-(segment.start + segment.count) // noise.CHUNK) - segment.start // noise.CHUNK
        programs += -(-chunks // _CHUNKS_OF_A_PROGRAM)
    table = to_device(torch.tensor(rows, dtype=torch.int64), segments[0].out.device)
    return table, programs, len(segments)


@triton.jit(do_not_specialize=["segments", *_WORDS, *_SCALES])
def _privatize(
    table, inexact, segments,
    key_0: tl.int32, key_1: tl.int32, key_2: tl.int32, key_3: tl.int32,
    key_4: tl.int32, key_5: tl.int32, key_6: tl.int32, key_7: tl.int32, release_low: tl.int32, release_high: tl.int32,
    one: tl.int32, clamp: tl.int64, units: tl.int64, scale: tl.int64, radius, cosine, sine,
    ACCUMULATOR: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr, CLEAR: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: `CHUNKS` chunks of the segment that `_find` gives, one by one, from accumulator to gradient."""
    row = _find(table, segments)
    accumulator = tl.load(row + _ACCUMULATOR).to(tl.pointer_type(ACCUMULATOR))
    out = tl.load(row + _OUT).to(tl.pointer_type(OUT))
    key, one = (key_0, key_1, key_2, key_3, key_4, key_5, key_6, key_7), _unsigned(one)
    normal = (one, radius, cosine, sine)
    bounds, parameter = (number(clamp), number(units), number(scale)), _word(row + _PARAMETER)
    chunk, begin, least, most = _range(row, CHUNKS)
    lane = tl.arange(0, LANES)
    counter = (chunk * LANES).to(tl.uint32) + lane.to(tl.uint32)
    exact = tl.full([LANES], True, tl.int1)
    for _ in range((most + CHUNK - 1) // CHUNK):
        words = _chacha20(key, counter, parameter, _unsigned(release_low), _unsigned(release_high), one)
        if COLUMNS or least > 0 or most < CHUNK:
            exact = exact & _write(
                row, accumulator, out, begin, lane, least, most, words, bounds, normal,
                INSIDE=False, COLUMNS=COLUMNS, CLEAR=CLEAR,
            )  # fmt: skip
        else:
            exact = exact & _write(
                row, accumulator, out, begin, lane, least, most, words, bounds, normal,
                INSIDE=True, COLUMNS=COLUMNS, CLEAR=CLEAR,
            )  # fmt: skip
        counter += LANES
        begin += CHUNK
        least -= CHUNK
        most -= CHUNK
    tl.store(inexact, 1, mask=tl.min(exact.to(tl.int32)) == 0)


@triton.jit
def _write(
    row, accumulator, out, begin, lane, least, most, words, bounds, normal,
    INSIDE: tl.constexpr, COLUMNS: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """One chunk from accumulator to gradient; whether its sums were exact. `INSIDE`: all of its slots are inside."""
    clamp, units, scale = bounds
    # Without its last two bits, so that three times it is exact, and one instruction takes off `_WHOLE` and scales.
    short = (scale.to(tl.int64, bitcast=True) & -4).to(tl.float64, bitcast=True)
    exact = tl.full([LANES], True, tl.int1)
    if INSIDE:
        sums = _sums(accumulator + begin + lane)
    for pair in tl.static_range(PAIRS):
        length, c, s = normal_pair(words, pair, normal)
        for half in tl.static_range(2):
            slot = lane + (2 * pair + half) * LANES
            source, target = accumulator + begin + slot, out + begin + slot
            if INSIDE:
                total = sums[2 * pair + half]
            else:
                inside = (slot >= least) & (slot < most)
                if COLUMNS:
                    width, offset, size = tl.load(row + _WIDTH), tl.load(row + _OFFSET), tl.load(row + _SIZE)
                    place = begin + slot
                    column = place % width - offset
                    inside = inside & (column >= 0) & (column < size)
                    place = place // width * size + column
                    source, target = accumulator + place, out + place
                total = tl.load(source, mask=inside, other=0.0)
            total = tl.fma(_clamped(total, clamp), units, tl.full([LANES], _WHOLE, tl.float64))
            total = tl.fma(length, c if half == 0 else s, total)
            if out.dtype.element_ty == tl.float64:
                total -= _WHOLE
                exact = exact & (tl.abs(total) <= _EXACT)
                total *= scale
            else:
                total = tl.fma(total, short, -_WHOLE * short)
                exact = exact & (tl.abs(total) <= _EXACT * short)
            if INSIDE:
                _store(target, total)
                if CLEAR:
                    tl.store(source, tl.zeros([LANES], source.dtype.element_ty))
            else:
                _store(target, total, inside)
                if CLEAR:
                    tl.store(source, tl.zeros([LANES], source.dtype.element_ty), mask=inside)
    return exact


@triton.jit
def _sums(source):
    """The eight slots of each lane, read before any is written: the compiler may not change that order by itself."""
    return (
        tl.load(source), tl.load(source + LANES), tl.load(source + 2 * LANES), tl.load(source + 3 * LANES),
        tl.load(source + 4 * LANES), tl.load(source + 5 * LANES), tl.load(source + 6 * LANES),
        tl.load(source + 7 * LANES),
    )  # fmt: skip


@triton.jit
def _clamped(total, clamp):
    """`total` in float64, between -clamp and clamp; NaN stays NaN and is found later."""
    if total.dtype == tl.float32:
        # Two instructions instead of six.
        bound = clamp.to(tl.float32)
        below = (bound.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
        bound = tl.where(bound.to(tl.float64) > clamp, below, bound)
        total = tl.clamp(total, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
        return total.to(tl.float64)
    total = total.to(tl.float64)
    return tl.where(total > clamp, clamp, tl.where(total < -clamp, -clamp, total))


@triton.jit(do_not_specialize=["segments"])
def _zero_if_inexact(
    table, inexact, segments, OUT: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """One program: the same chunks as in `_privatize`, zeroed if any program of that launch found an inexact sum."""
    if tl.load(inexact) != 0:
        row = _find(table, segments)
        out = tl.load(row + _OUT).to(tl.pointer_type(OUT))
        _, begin, least, most = _range(row, CHUNKS)
        for _ in range((most + CHUNK - 1) // CHUNK):
            slot = tl.arange(0, CHUNK)
            inside, place = (slot >= least) & (slot < most), begin + slot
            if COLUMNS:
                width, offset, size = tl.load(row + _WIDTH), tl.load(row + _OFFSET), tl.load(row + _SIZE)
                column = place % width - offset
                inside = inside & (column >= 0) & (column < size)
                place = place // width * size + column
            tl.store(out + place, tl.zeros([CHUNK], OUT), mask=inside)
            begin += CHUNK
            least -= CHUNK
            most -= CHUNK


@triton.jit(do_not_specialize=_WORDS)
def _standard_normal(
    table,
    key_0: tl.int32, key_1: tl.int32, key_2: tl.int32, key_3: tl.int32,
    key_4: tl.int32, key_5: tl.int32, key_6: tl.int32, key_7: tl.int32, release_low: tl.int32, release_high: tl.int32,
    one: tl.int32, radius, cosine, sine, CHUNKS: tl.constexpr,
):  # fmt: skip
    out = tl.load(table + _OUT).to(tl.pointer_type(tl.float64))
    key, one = (key_0, key_1, key_2, key_3, key_4, key_5, key_6, key_7), _unsigned(one)
    normal = (one, radius, cosine, sine)
    chunk, begin, least, most = _range(table, CHUNKS)
    parameter = _word(table + _PARAMETER)
    lane = tl.arange(0, LANES)
    for i in range(CHUNKS):
        counter = ((chunk + i) * LANES).to(tl.uint32) + lane.to(tl.uint32)
        words = _chacha20(key, counter, parameter, _unsigned(release_low), _unsigned(release_high), one)
        for pair in tl.static_range(PAIRS):
            length, c, s = normal_pair(words, pair, normal)
            slot = lane + (i * CHUNK + 2 * pair * LANES)
            tl.store(out + begin + slot, length * c, mask=(slot >= least) & (slot < most))
            slot += LANES
            tl.store(out + begin + slot, length * s, mask=(slot >= least) & (slot < most))


@triton.jit(do_not_specialize=["blocks"])
def _keystream(head, out, blocks):
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    counter = (block + tl.load(head + 11)).to(tl.uint32)
    key = (
        _word(head), _word(head + 1), _word(head + 2), _word(head + 3),
        _word(head + 4), _word(head + 5), _word(head + 6), _word(head + 7),
    )  # fmt: skip
    words = _chacha20(key, counter, _word(head + 8), _word(head + 9), _word(head + 10), 1)
    for word in tl.static_range(16):
        tl.store(out + block * 16 + word, words[word].to(tl.int32, bitcast=True), mask=block < blocks)


@triton.jit
def _find(table, segments):
    """The row of the segment of this program: the last one whose first program is not beyond it, by bisection."""
    program = tl.program_id(0)
    low, high = segments * 0, segments
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(table + middle * _FIELDS + _FIRST_PROGRAM) <= program
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    return table + low * _FIELDS


@triton.jit
def _range(row, CHUNKS: tl.constexpr):
    """This program's first chunk; where in the shard its slot 0 is; from which of its slots to which they are inside."""
    start, count = tl.load(row + _START), tl.load(row + _COUNT)
    chunk = start // CHUNK + (tl.program_id(0) - tl.load(row + _FIRST_PROGRAM)).to(tl.int64) * CHUNKS
    begin = chunk * CHUNK - start
    least, most = tl.maximum(-begin, 0), tl.minimum(count - begin, CHUNK * CHUNKS)
    return chunk, begin, least.to(tl.int32), most.to(tl.int32)


@triton.jit
def _store(pointer, value, mask=None):
    """float64 to what `pointer` points to, narrow formats by way of float32 as torch does it."""
    if pointer.dtype.element_ty == tl.float64:
        tl.store(pointer, value, mask=mask)
    else:
        tl.store(pointer, value.to(tl.float32).to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _word(pointer):
    """A word of the table, as uint32."""
    return tl.load(pointer).to(tl.uint32)


@triton.jit
def _unsigned(word):
    """An int32 argument with the bits of a uint32."""
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def _chacha20(key, x12, x13, x14, x15, one):
    """The block function of RFC 8439 section 2.3: sixteen uint32 words; only `x12` differs between lanes.

    The first double round stands by itself, as most of it is the same for all lanes. The last additions multiply by
    `one`, [Note: one] in `box_muller`.
    """
    x0, x1, x2, x3 = 0x61707865, 0x3320646E, 0x79622D32, 0x6B206574
    x4, x5, x6, x7 = _unsigned(key[0]), _unsigned(key[1]), _unsigned(key[2]), _unsigned(key[3])
    x8, x9, x10, x11 = _unsigned(key[4]), _unsigned(key[5]), _unsigned(key[6]), _unsigned(key[7])
    v = _double_round((x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15))
    for _ in range(9):
        v = _double_round(v)
    return (
        v[0] * one + x0, v[1] * one + x1, v[2] * one + x2, v[3] * one + x3,
        v[4] * one + x4, v[5] * one + x5, v[6] * one + x6, v[7] * one + x7,
        v[8] * one + x8, v[9] * one + x9, v[10] * one + x10, v[11] * one + x11,
        v[12] * one + x12, v[13] * one + x13, v[14] * one + x14, v[15] * one + x15,
    )  # fmt: skip


@triton.jit
def _double_round(v):
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15 = v
    v0, v4, v8, v12 = _quarter_round(v0, v4, v8, v12)
    v1, v5, v9, v13 = _quarter_round(v1, v5, v9, v13)
    v2, v6, v10, v14 = _quarter_round(v2, v6, v10, v14)
    v3, v7, v11, v15 = _quarter_round(v3, v7, v11, v15)
    v0, v5, v10, v15 = _quarter_round(v0, v5, v10, v15)
    v1, v6, v11, v12 = _quarter_round(v1, v6, v11, v12)
    v2, v7, v8, v13 = _quarter_round(v2, v7, v8, v13)
    v3, v4, v9, v14 = _quarter_round(v3, v4, v9, v14)
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15


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
