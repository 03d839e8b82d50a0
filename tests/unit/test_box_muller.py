"""The kernel's log, root, sine and cosine against long double and against the reference, where they could go wrong.

Triton's interpreter runs the kernel's own functions, with approximations that are cut to the 20 bits the hardware
promises; it rounds products before it adds, which a GPU does not.
"""

import math
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from fsdp_dp import noise
from tests.unit.interpreted import interpreter

LAST = 2**32 - 1
PI = np.longdouble("3.14159265358979323846264338327950288")

pytestmark = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is no wider than float64 here")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    with interpreter():
        from tests.unit import box_muller_kernel

        yield box_muller_kernel


def random_words(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)


def made(module: ModuleType, words: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """float64 [3, n] of words [4, n]: signed radius, cosine, sine."""
    out = torch.empty(3, words.shape[1], dtype=torch.float64)
    module.run(torch.from_numpy(words.view(np.int32)).contiguous(), out, scale)
    return out.numpy()


def exact(words: np.ndarray) -> np.ndarray:
    """Long double [3, n] from the uniform as the reference rounds it, and the angle as it is."""
    low, high, angle_low = (word.astype(np.float64) for word in words[:3])
    u = np.longdouble((high * 2.0**32 + (low + 1.0)) * 2.0**-64)
    half_turns = np.longdouble(words[3].view(np.int32)) * np.longdouble(2) ** -31 + np.longdouble(angle_low) * (
        np.longdouble(2) ** -63
    )
    whole = np.rint(half_turns)
    sign = np.where(whole % 2 != 0, -1, 1)
    rest = (half_turns - whole) * PI
    return np.stack([np.sqrt(-2 * np.log(u)), sign * np.cos(rest), sign * np.sin(rest)])


def reference(words: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    low, high, angle_low = (torch.from_numpy(word.astype(np.float64)) for word in words[:3])
    angle_high = torch.from_numpy(words[3].view(np.int32).astype(np.float64))
    radius, angle = noise._radius(low, high), noise._angle(angle_low, angle_high)
    return radius * angle.cos(), radius * angle.sin()


def words_of(kind: str) -> np.ndarray:
    """uint32 [4, 4096]: radius low and high, angle low and high."""
    n = 4096
    words = np.stack([random_words(n, seed) for seed in range(4)])
    shift = random_words(n, 5) % 32
    corners = random_words(n, 6) % 4 * 2**30 + random_words(n, 7) % 7 - 3
    if kind == "tails":
        words[1] >>= shift
    elif kind == "ends of tails":
        words[0], words[1] = words[0] >> shift, 0
    elif kind == "near one":
        words[1] = LAST - (words[1] >> shift)
    elif kind == "nearest one":
        words[0], words[1] = LAST - (words[0] >> shift), LAST
    elif kind == "quarter turns":
        words[2], words[3] = random_words(n, 8) % 3 - 1, corners
    return words


KINDS = ["random", "tails", "ends of tails", "near one", "nearest one", "quarter turns"]


@pytest.mark.parametrize("kind", KINDS)
def test_radius_cosine_and_sine_are_exact_to_rounding(interpreted: ModuleType, kind: str) -> None:
    """Seen to fail with a quadratic step for a cubic one, in log or root, and with the coefficients of sine shifted."""
    words = words_of(kind)
    (length, cosine, sine), (radius, exact_cosine, exact_sine) = made(interpreted, words), exact(words)
    sign = np.sign(length)
    positive = radius > 0
    assert (np.abs(length)[~positive] < 1e-29).all()
    assert (np.abs(np.abs(length) - radius)[positive] <= 5e-16 * radius[positive]).all()
    assert (np.abs(sign * cosine - exact_cosine) <= 5e-16).all()
    assert (np.abs(sign * sine - exact_sine) <= 5e-16 * np.abs(exact_sine)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_normals_are_the_references_to_1e_15_of_the_radius(interpreted: ModuleType, kind: str) -> None:
    words = words_of(kind)
    length, cosine, sine = made(interpreted, words)
    for found, expected in zip((length * cosine, length * sine), reference(words), strict=True):
        assert (np.abs(found - expected.numpy()) <= 1e-15 * np.abs(length) + 1e-29).all()


def test_the_ends_of_the_uniform(interpreted: ModuleType) -> None:
    """u = 2^-64 is reached, and so is u = 1, where a radius of zero would be 0 times infinity."""
    words = np.array([[0, LAST, 1], [0, LAST, 0], [0, 0, 0], [0, 0, 0]], dtype=np.uint32)
    length, cosine, _ = made(interpreted, words)
    assert math.isclose(length[0], math.sqrt(128 * math.log(2)), rel_tol=5e-16)
    assert 0 <= length[1] < 1e-29
    assert math.isclose(length[2], math.sqrt(126 * math.log(2)), rel_tol=5e-16)
    assert (cosine == 1).all()


@pytest.mark.parametrize("exponent", [16, 40, 50])
def test_a_scale_moves_the_exponent_alone(interpreted: ModuleType, exponent: int) -> None:
    words = words_of("random")
    plain, scaled = made(interpreted, words), made(interpreted, words, 2.0**exponent)
    assert np.array_equal(plain[0] * 2.0**exponent, scaled[0])
    assert np.array_equal(plain[1:], scaled[1:])


def test_float32_sums_are_clamped_below_the_bound(interpreted: ModuleType) -> None:
    """Seen to fail where the bound is rounded to nearest."""
    sums = torch.tensor([math.nan, math.inf, -math.inf, 3.0, -0.1, 0.3, 0.09], dtype=torch.float32)
    for bound in (0.1, 0.3, math.pi, 2080.0, 1e-3):
        found = torch.empty(len(sums), dtype=torch.float64)
        interpreted.run_clamp(sums, found, bound)
        expected = sums.double().clamp(-bound, bound)
        assert found[0].isnan() and (found[1:].abs() <= bound).all()
        assert torch.allclose(found[1:], expected[1:], rtol=2.0**-23, atol=0)
