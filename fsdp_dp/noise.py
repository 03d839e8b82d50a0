"""Gaussian noise as a pure function of (key, release, parameter, element), and the lattice that it is added on.

In the step: the engine asks for the noise of its own shard, an index range of a parameter, and adds it to the clipped
sum with `Lattice.privatize`. Nothing here has state: any sharding and any world size draw the same field, replicas
agree by construction, and a rank computes only its shard.

[Note: layout of the field]. Element e of a parameter (flat index in the unsharded tensor) sits in chunk e // 1024, at
r = e % 1024, lane r % 128, slot r // 128. Chunk and lane name the ChaCha20 block: counter 128 * chunk + lane. Slots 2k
and 2k + 1 of a block share its words 4k .. 4k + 3: a 64-bit radius uniform (words 4k low, 4k + 1 high) and a 64-bit
angle (words 4k + 2 low, 4k + 3 high). Neighbouring elements are neighbouring lanes, so that a GPU kernel with one block
a thread stores coalesced. The nonce is (parameter, release low 32 bits, release high 32 bits).

Legend: C chunks, K = 4 pairs of slots of a block, L = 128 lanes.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fsdp_dp.chacha import KEY_BYTES, WORD_LIMIT, keystream, keystream_of_blocks

__all__ = [
    "MAX_NORMAL", "Lattice", "derive_key", "key_from_seed", "keystream", "new_key", "normals_at", "standard_normal",
]  # fmt: skip

LANES = 128
PAIRS = 4
CHUNK = LANES * 2 * PAIRS

# Blocks are counted in 32 bits, 128 of them a chunk: the elements one (key, release, parameter) can serve.
MAX_ELEMENTS = WORD_LIMIT // LANES * CHUNK

# No |normal| is larger: the radius ends at sqrt(2 * 64 * ln 2) = 9.4192 (probability 2^-64 of a wider pair).
MAX_NORMAL = 9.42

# Elements made at a time, so that temporaries stay below 100 MB however large the shard is.
_ELEMENTS_AT_A_TIME = 2**20

# Sum and noise stay below 2^50 lattice units together: exact in float64, with two bits to spare (Lattice, step 1).
_UNIT_BITS = 50


def new_key() -> bytes:
    """A 256-bit key from the operating system's entropy. Never write it to disk, a log or a checkpoint."""
    return os.urandom(KEY_BYTES)


def key_from_seed(seed: int) -> bytes:
    """A key that anyone who knows `seed` knows too: for tests only, there is no privacy guarantee under it."""
    return hashlib.blake2b(str(int(seed)).encode(), digest_size=KEY_BYTES, person=b"fsdp_dp seed").digest()


def derive_key(master: bytes, purpose: str) -> bytes:
    """The key of one `purpose` ("noise", "sampling", ...) under `master`; BLAKE2b keyed by `master`.

    **Formal guarantee.** Different purposes give keys that are computationally independent of each other and of
    `master` (BLAKE2b is a pseudorandom function of its key), so that no two uses share random bits.
    """
    if len(master) != KEY_BYTES:
        raise ValueError(f"master: found {len(master)} bytes, expected {KEY_BYTES}; make one with noise.new_key()")
    return hashlib.blake2b(purpose.encode(), key=master, digest_size=KEY_BYTES, person=b"fsdp_dp purpose").digest()


def standard_normal(
    key: bytes, *, release: int, parameter: int, start: int, count: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normals of the elements `start .. start + count - 1` of one parameter in one release.

    Args:
        key: 32 secret bytes, used for noise only.
        release: number of the release, in [0, 2^64).
        parameter: canonical index of the parameter, in [0, 2^32).
        start: first flat element, in the numbering of the unsharded parameter.
        count: how many elements.
        device: where the keystream and the normals are computed.

    Returns:
        float64 [count]. An element's bits depend on (key, release, parameter, element) alone, so any split of a range
        gives the same bits on one kind of device (kinds may differ in the last bits of log, sin and cos).

    Raises:
        ValueError: `start` or `count` is negative.
        OverflowError: the release, the parameter index or the element does not fit its counter.

    **Formal guarantee.** (release, parameter) -> nonce and (element) -> (block, words) are injective, and every number
    out of range raises, so no two pairs of normals ever share a keystream word under one key. With ChaCha20 a
    pseudorandom function, the field is computationally indistinguishable from one made of independent uniform bits,
    and those give independent standard normals up to (i) the cut of the radius at 9.4192, probability 2^-64 a pair,
    (ii) float64 rounding, a few 2^-53 relative to the radius. Box and Muller 1958.
    """
    _check_range(release, parameter, start, count)
    nonce = (parameter, release % WORD_LIMIT, release // WORD_LIMIT)
    normals = torch.empty(count, dtype=torch.float64, device=device)
    stop = start + count
    chunks_at_a_time = _ELEMENTS_AT_A_TIME // CHUNK
    for chunk in range(start // CHUNK, -(-stop // CHUNK), chunks_at_a_time):
        # Whole chunks are made and cut: at most 2046 elements too many at the two ends of the range.
        last_chunk = min(chunk + chunks_at_a_time, -(-stop // CHUNK))
        first, last = max(start, chunk * CHUNK), min(stop, last_chunk * CHUNK)
        words = keystream(key, nonce, chunk * LANES, (last_chunk - chunk) * LANES, device)
        made = _normals_of_chunks(words)
        normals[first - start : last - start] = made[first - chunk * CHUNK : last - chunk * CHUNK]
    return normals


def normals_at(key: bytes, *, release: int, places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """`standard_normal` of single elements, float64 [N]: of each (parameter, element), in one release; on CPU."""
    blocks, slots = [], []
    for parameter, element in places:
        _check_range(release, parameter, element, 1)
        chunk, r = divmod(element, CHUNK)
        blocks.append((LANES * chunk + r % LANES, (parameter, release % WORD_LIMIT, release // WORD_LIMIT)))
        slots.append(r // LANES)
    slot_N = torch.tensor(slots, dtype=torch.int64)
    words_NK4 = keystream_of_blocks(key, blocks).view(-1, PAIRS, 4)
    words_4N = words_NK4[torch.arange(len(slots)), slot_N // 2].t().to(torch.float64)
    cos_N, sin_N = _normals_of_words(words_4N)
    return torch.where(slot_N % 2 == 0, cos_N, sin_N)


def _normals_of_chunks(words: torch.Tensor) -> torch.Tensor:
    """Keystream words int32 [C * L, 16] to normals float64 [C * 1024], by [Note: layout of the field]."""
    words_4CKL = words.view(-1, LANES, PAIRS, 4).permute(3, 0, 2, 1).contiguous().to(torch.float64)
    return torch.stack(_normals_of_words(words_4CKL), dim=2).view(-1)


def _normals_of_words(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both normals of pairs, from their four words read as int32, float64 [4, ...]."""
    radius_low, radius_high, angle_low, angle_high = words
    radius = _radius(_unsigned(radius_low), _unsigned(radius_high))
    angle = _angle(_unsigned(angle_low), angle_high)
    return radius * angle.cos(), radius * angle.sin()


def _radius(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Rayleigh radius sqrt(-2 ln u), with u = (x + 1) / 2^64 in (0, 1] of the 64-bit integer x = 2^32 high + low.

    Both terms of x + 1 are exact in float64 and their sum is rounded once, relative to its leading bit: a tiny u keeps
    full precision, and the smallest, 2^-64, is reached. Cutting u at 2^-53 would end the tail at 8.57.
    """
    u = (high * 2.0**32).add_(low.add(1.0)).mul_(2.0**-64)
    return u.log_().mul_(-2.0).sqrt_()


def _angle(low: torch.Tensor, signed_high: torch.Tensor) -> torch.Tensor:
    """Angle in [-pi, pi]: pi / 2^63 times the *signed* 64-bit integer of the two words, precise around zero."""
    return (signed_high * 2.0**32).add_(low).mul_(math.pi * 2.0**-63)


def _unsigned(words: torch.Tensor) -> torch.Tensor:
    """Words read as int32, in float64, to the uint32 with the same bits (exact)."""
    return torch.where(words < 0, words + 2.0**32, words)


def _check_range(release: int, parameter: int, start: int, count: int) -> None:
    if start < 0 or count < 0:
        raise ValueError(f"start and count must be at least 0, found {start} and {count}")
    if not 0 <= release < WORD_LIMIT**2:
        raise OverflowError(f"release: found {release}, expected an integer in [0, 2^64); noise would repeat")
    if not 0 <= parameter < WORD_LIMIT:
        raise OverflowError(f"parameter: found index {parameter}, expected an integer in [0, 2^32); noise would repeat")
    if start + count > MAX_ELEMENTS:
        raise OverflowError(
            f"element {start + count - 1} is past 2^35 - 1, where the 32-bit block counter would wrap and noise would "
            "repeat; split the parameter in several"
        )


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """The public grid on which clipped sum and noise are rounded and added, exactly.

    Attributes:
        spacing: lambda, in units of the gradient.
        clamp: bound put on every element of the sum before rounding, `(4 * expected_batch_size + 64) * max_grad_norm`.

    Floating-point addition of noise leaks: which low-order bits are possible depends on the sum. Here the noise in
    units of lambda is an integer drawn without looking at the sum, and adding integers below 2^53 is exact.

    **Formal guarantee.** Let S be the clipped sum [d], xi [d] standard normals, y = sigma * R / lambda * xi, and
    r(x) = floor(x + 1/2). `privatize` returns lambda * (n + r(y)), with the integers n = r(clamp(S) / lambda).

    1. *Sensitivity*. Clamping elementwise is 1-Lipschitz in the L2 norm. The float64 quotient, below 2^50, is off by at
       most 1/4 (also where a device multiplies by 1 / lambda), and r moves it by at most 1/2, so each element of
       lambda * n is within (3/4) lambda of clamp(S). Hence the sums S, S' of neighbouring datasets give
       |lambda n - lambda n'| <= |S - S'| + (3/2) lambda sqrt(d): `sensitivity_charge`.
    2. *Mechanism*. n is an integer, so n + r(y) = r(n + y): the output is a function of n + y, that is of the Gaussian
       mechanism with standard deviation sigma * R on lambda * n. Post-processing, hence the accountant's epsilon at
       sensitivity R + charge; this holds for exact Gaussian xi.
    3. *Exactness*. |n| + |r(y)| <= 2^50 by the choice of lambda, so the sum is exact and the output shows nothing of
       S but n + r(y). It is checked on every call.
    4. *Finite xi*. xi has 53 bits, so y lies on a grid of 2^-53 |y|: about 2^14 points a cell at |xi| = 1, sigma = 1
       and expected_batch_size = 512. The cells must hold equally many of them, or the distribution of r(y) has a
       pattern from cell to cell, and the low bits of n + r(y) show n through it, a little in each of 10^9 elements.
       Hence floor(x + 1/2), since rounding ties to even gives even cells two points more than odd ones; and hence
       lambda = sigma * R * 2^-j, not R * 2^-k, since only scaling by a power of two keeps the grid of xi aligned with
       the cells. `privatize` refuses another scale. What is left varies smoothly over cells.
    """

    spacing: float
    clamp: float

    @classmethod
    def for_release(cls, *, max_grad_norm: float, noise_multiplier: float, expected_batch_size: float) -> Lattice:
        """The finest lattice on which a release with these public numbers is exact.

        With M = 4 * expected_batch_size + 64 and noise below 16 sigma (MAX_NORMAL is less), everything is below
        R * (M + 16 sigma + 2), which is put at 2^50 units or less. At sigma = 0 the spacing is R times a power of two.

        Raises:
            ValueError: a number is out of range, or sigma is so small beside the batch (about 1e-10 of it) that its
                noise would be a few lattice units.
        """
        if not (0 < max_grad_norm < math.inf and 0 <= noise_multiplier < math.inf and 0 < expected_batch_size < 2**40):
            raise ValueError(
                "the lattice needs finite max_grad_norm > 0, noise_multiplier >= 0 and 0 < expected_batch_size < 2^40, "
                f"found {max_grad_norm}, {noise_multiplier} and {expected_batch_size}"
            )
        clamp_in_R = 4 * expected_batch_size + 64
        unit_in_R = noise_multiplier or 1.0
        exponent = math.floor(_UNIT_BITS - math.log2((clamp_in_R + 16 * noise_multiplier + 2) / unit_in_R))
        if exponent < 16:
            raise ValueError(
                f"noise_multiplier: found {noise_multiplier}, too small to be exact in float64 beside "
                f"expected_batch_size={expected_batch_size}; use 0.0 to debug without noise"
            )
        spacing = math.ldexp(unit_in_R * max_grad_norm, -exponent)
        clamp = clamp_in_R * max_grad_norm
        if not (spacing > 2.0**-1000 and clamp < 2.0**1000):
            raise ValueError(f"max_grad_norm: found {max_grad_norm}, expected one whose lattice fits float64's range")
        return cls(spacing=spacing, clamp=clamp)

    def sensitivity_charge(self, dimension: int) -> float:
        """What rounding `dimension` elements to the lattice may add to the L2 sensitivity (step 1 of the guarantee)."""
        return 1.5 * self.spacing * math.sqrt(dimension)

    def privatize(self, sum_flat: torch.Tensor, noise_flat: torch.Tensor, noise_std: float) -> torch.Tensor:
        """`lambda * (r(clamp(S) / lambda) + r(noise_std * xi / lambda))`, elementwise; see the class for r and why.

        Args:
            sum_flat: clipped sum S [n], any floating dtype; not modified.
            noise_flat: standard normals xi [n], float64; not modified.
            noise_std: sigma * R, of the sigma and R the lattice was made for; 0.0 at sigma = 0.

        Returns:
            float64 [n], each element the float64 nearest to an integer multiple of `spacing`.

        Raises:
            ValueError: shapes or the dtype of the noise differ from the above, or `noise_std` is not `spacing` times
                a power of two (step 4 of the guarantee).
            FloatingPointError: a result is not an exact integer number of units (the sum holds NaN, the noise is not
                standard normal); nothing is released.
        """
        if noise_flat.dtype != torch.float64 or noise_flat.shape != sum_flat.shape:
            raise ValueError(
                f"noise_flat: found {noise_flat.dtype} {list(noise_flat.shape)}, expected torch.float64 "
                f"{list(sum_flat.shape)}, the shape of the sum"
            )
        units_of_noise = noise_std / self.spacing
        if noise_std != 0 and math.frexp(units_of_noise)[0] != 0.5:
            raise ValueError(
                f"noise_std: found {noise_std}, not a power of two times the spacing {self.spacing}; make the lattice "
                "with Lattice.for_release from the same noise_multiplier and max_grad_norm, their product is noise_std"
            )
        clamped = sum_flat.to(torch.float64, copy=True).clamp_(-self.clamp, self.clamp)
        total = _round(clamped.div_(self.spacing))
        total += _round(noise_flat * units_of_noise)
        if not bool((total.abs() <= 2.0**_UNIT_BITS).all()):
            raise FloatingPointError(
                "release: an element is not an exact number of lattice units; the clipped sum holds NaN, or the noise "
                f"is not standard normal (|xi| <= {MAX_NORMAL}). Nothing was released"
            )
        return total.mul_(self.spacing)


def _round(x: torch.Tensor) -> torch.Tensor:
    """floor(x + 1/2) in place: shifts with integers, and every cell is half-open (Lattice, step 4)."""
    return x.add_(0.5).floor_()
