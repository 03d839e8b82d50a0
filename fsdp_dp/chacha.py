"""The ChaCha20 keystream as a random-access function: (key, nonce, block number) -> sixteen 32-bit words.

Every random bit of a private run comes from here. Two implementations give the same bits: the `cryptography` package on
CPU where it is installed (OpenSSL, seeks by counter), and plain torch operations on any device. RFC 8439 section 2.3 is
the definition: 20 rounds, 256-bit key, 96-bit nonce, 32-bit block counter, words little-endian.

Legend: N blocks, 16 words of a block; words are int32 *bit patterns* (torch has few operations on uint32).
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Sequence

import torch

KEY_BYTES = 32
WORD_LIMIT = 2**32
WORDS_PER_BLOCK = 16
BYTES_PER_BLOCK = 64

Nonce = tuple[int, int, int]

# "expand 32-byte k", RFC 8439 section 2.3.
_CONSTANTS = struct.unpack("<4i", b"expand 32-byte k")


def keystream(
    key: bytes, nonce: Nonce, first_block: int, blocks: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Blocks `first_block .. first_block + blocks - 1` of the keystream of (`key`, `nonce`).

    Args:
        key: 32 secret bytes.
        nonce: three integers in [0, 2^32), the words 13, 14, 15 of the ChaCha20 state.
        first_block: number of the first block, at least 0.
        blocks: how many blocks, N.
        device: where the words are wanted.

    Returns:
        int32 [N, 16], the words of each block as bit patterns; bit-identical whatever the device.

    Raises:
        ValueError: the key is not 32 bytes, or a count is negative.
        OverflowError: a nonce word or the 32-bit block counter would wrap, so that bits would repeat.
    """
    _check(key, nonce, first_block, blocks)
    device = torch.device(device)
    if device.type == "cpu" and _openssl_has_chacha20():
        return keystream_openssl(key, nonce, first_block, blocks)
    return keystream_torch(key, nonce, first_block, blocks, device)


def keystream_openssl(key: bytes, nonce: Nonce, first_block: int, blocks: int) -> torch.Tensor:
    """`keystream` on CPU through the `cryptography` package: the encryption of zeros is the keystream."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    _check(key, nonce, first_block, blocks)
    if blocks == 0:
        return torch.empty(0, WORDS_PER_BLOCK, dtype=torch.int32)
    counter_and_nonce = struct.pack("<4I", first_block, *nonce)
    encryptor = Cipher(algorithms.ChaCha20(key, counter_and_nonce), mode=None).encryptor()
    stream = bytearray(blocks * BYTES_PER_BLOCK)
    encryptor.update_into(bytes(len(stream)), stream)
    return torch.frombuffer(stream, dtype=torch.int32).view(blocks, WORDS_PER_BLOCK)


def keystream_torch(
    key: bytes, nonce: Nonce, first_block: int, blocks: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """`keystream` in torch operations on `device`."""
    _check(key, nonce, first_block, blocks)
    counter_N = torch.arange(first_block, first_block + blocks, dtype=torch.int64, device=device)
    nonce_3 = torch.tensor(nonce, dtype=torch.int64, device=device)
    return _blocks(key, torch.cat([counter_N[None], nonce_3[:, None].expand(3, blocks)]))


def keystream_of_blocks(key: bytes, blocks: Sequence[tuple[int, Nonce]]) -> torch.Tensor:
    """int32 [N, 16]: the words of single blocks, each by its number and nonce, all at once; on CPU.

    Raises:
        ValueError, OverflowError: as `keystream`, for any of them.
    """
    for number, nonce in blocks:
        _check(key, nonce, number, 1)
    places_N4 = torch.tensor([(number, *nonce) for number, nonce in blocks], dtype=torch.int64).view(-1, 4)
    return _blocks(key, places_N4.t())


def _blocks(key: bytes, places_4N: torch.Tensor) -> torch.Tensor:
    """The blocks of these counters and nonce words, the last four of the state, each in [0, 2^32).

    The four rows of the state are four [4, N] tensors.
    """
    head = torch.tensor([*_CONSTANTS, *struct.unpack("<8i", key)], dtype=torch.int32, device=places_4N.device)
    initial = torch.cat([head[:, None].expand(12, places_4N.shape[1]), _as_int32(places_4N)])
    a, b, c, d = initial.clone().split(4)
    for _ in range(10):
        _quarter_rounds(a, b, c, d)
        # Rotating the rows turns the diagonals of the state into columns, and back (RFC 8439 section 2.3.1).
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
        _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return torch.cat([a, b, c, d]).add_(initial).t().contiguous()


def _quarter_rounds(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> None:
    """One quarter round on each of the four columns, in place (RFC 8439 section 2.1); int32 sums wrap modulo 2^32."""
    _rotate_left(d.bitwise_xor_(a.add_(b)), 16)
    _rotate_left(b.bitwise_xor_(c.add_(d)), 12)
    _rotate_left(d.bitwise_xor_(a.add_(b)), 8)
    _rotate_left(b.bitwise_xor_(c.add_(d)), 7)


def _rotate_left(x: torch.Tensor, bits: int) -> None:
    """Rotate int32 bit patterns left, in place; the mask removes the sign bits that an arithmetic shift brings in."""
    wrapped = (x >> (32 - bits)).bitwise_and_((1 << bits) - 1)
    x.bitwise_left_shift_(bits).bitwise_or_(wrapped)


def _as_int32(x: torch.Tensor) -> torch.Tensor:
    """int64 values in [0, 2^32) to the int32 with the same low bits, without an out-of-range conversion."""
    return torch.where(x < 2**31, x, x - WORD_LIMIT).to(torch.int32)


def _check(key: bytes, nonce: Nonce, first_block: int, blocks: int) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: found {len(key)} bytes, expected {KEY_BYTES}; make one with noise.new_key()")
    if first_block < 0 or blocks < 0:
        raise ValueError(f"first_block and blocks must be at least 0, found {first_block} and {blocks}")
    if not all(0 <= word < WORD_LIMIT for word in nonce):
        raise OverflowError(f"nonce: found {nonce}, expected three integers in [0, 2^32); random bits would repeat")
    if first_block + blocks > WORD_LIMIT:
        raise OverflowError(
            f"block counter: blocks {first_block} to {first_block + blocks - 1} pass 2^32 - 1, and random bits would "
            "repeat; use another nonce for the rest"
        )


@functools.cache
def _openssl_has_chacha20() -> bool:
    """Whether the fast path works: `cryptography` is there, its OpenSSL offers ChaCha20, the host is little-endian."""
    if sys.byteorder != "little":
        return False
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
    except ImportError:
        return False
    try:
        keystream_openssl(bytes(KEY_BYTES), (0, 0, 0), 0, 1)
    except UnsupportedAlgorithm:
        return False
    return True
