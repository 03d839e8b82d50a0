"""Noise: the RFC's vectors, one field whatever the split, no bit used twice, Gaussian, exact on its lattice.

A docstring says "Seen to fail" where the property was broken on purpose and the test was seen to find it.
"""

import hashlib
import itertools
import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fsdp_dp import chacha, noise
from fsdp_dp.noise import Lattice, standard_normal

KEY = noise.key_from_seed(1)

needs_cryptography = pytest.mark.skipif(find_spec("cryptography") is None, reason="the cryptography package is absent")
IMPLEMENTATIONS = [
    pytest.param(chacha.keystream, id="chosen"),
    pytest.param(chacha.keystream_torch, id="torch"),
    pytest.param(chacha.keystream_openssl, id="openssl", marks=needs_cryptography),
]

# RFC 8439: section 2.3.2, then appendix A.1, vectors 1 to 5. (key, nonce bytes, counter, block as words of the state)
RFC_BLOCKS = [
    (
        bytes(range(32)),
        "000000090000004a00000000",
        1,
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3"
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2",
    ),
    (
        bytes(32),
        "000000000000000000000000",
        0,
        "ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b"
        "7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2",
    ),
    (
        bytes(32),
        "000000000000000000000000",
        1,
        "bee7079f 7a385155 7c97ba98 0d082d73 a0290fcb 6965e348 3e53c612 ed7aee32"
        "7621b729 434ee69c b03371d5 d539d874 281fed31 45fb0a51 1f0ae1ac 6f4d794b",
    ),
    (
        bytes(31) + b"\x01",
        "000000000000000000000000",
        1,
        "2452eb3a 9249f8ec 8d829d9b ddd4ceb1 e8252083 60818b01 f38422b8 5aaa49c9"
        "bb00ca8e da3ba7b4 c4b592d1 fdf2732f 4436274e 2561b3c8 ebdd4aa6 a0136c00",
    ),
    (
        b"\x00\xff" + bytes(30),
        "000000000000000000000000",
        2,
        "fb4dd572 4bc42ef1 df922636 327f1394 a78dea8f 5e269039 a1bebbc1 caf09aae"
        "a25ab213 48a6b46c 1b9d9bcb 092c5be6 546ca624 1bec45d5 87f47473 96f0992e",
    ),
    (
        bytes(32),
        "000000000000000000000002",
        0,
        "374dc6c2 3736d58c b904e24a cd3f93ef 88228b1a 96a4dfb3 5b76ab72 c727ee54"
        "0e0e978a f3145c95 1b748ea8 f786c297 99c28f5f 628314e8 398a19fa 6ded1b53",
    ),
]


def normals(release: int = 0, parameter: int = 0, start: int = 0, count: int = 1000) -> torch.Tensor:
    return standard_normal(KEY, release=release, parameter=parameter, start=start, count=count)


def unsigned(words: torch.Tensor) -> list[int]:
    return [word % 2**32 for word in words.flatten().tolist()]


# The keystream


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("key", "nonce", "counter", "block"), RFC_BLOCKS, ids=["2.3.2", *"12345"])
def test_rfc_8439_blocks(implementation, key, nonce, counter, block):
    nonce_words = tuple(int.from_bytes(bytes.fromhex(nonce)[i : i + 4], "little") for i in (0, 4, 8))
    digits = block.replace(" ", "")
    expected = [int(digits[start : start + 8], 16) for start in range(0, 128, 8)]
    assert unsigned(implementation(key, nonce_words, counter, 1)) == expected


@needs_cryptography
@pytest.mark.parametrize(("first_block", "blocks"), [(0, 1), (1, 1000), (2**31 - 3, 7), (2**32 - 5, 5), (9, 0)])
def test_both_implementations_agree_to_the_bit(first_block, blocks):
    """Random keys and nonces, across the sign bit of the counter and up to its last value."""
    for seed in range(3):
        key = noise.key_from_seed(seed)
        nonce = tuple(int.from_bytes(key[i : i + 4], "big") for i in (0, 4, 8))
        found = chacha.keystream_torch(key, nonce, first_block, blocks)
        assert found.shape == (blocks, 16) and found.dtype == torch.int32 and found.is_contiguous()
        assert torch.equal(found, chacha.keystream_openssl(key, nonce, first_block, blocks))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keystream_refuses_to_repeat_itself(implementation):
    """Seen to fail with the counter check removed: the torch implementation wraps round to block 0."""
    assert implementation(KEY, (0, 0, 0), 2**32 - 1, 1).shape == (1, 16)
    with pytest.raises(OverflowError, match="block counter"):
        implementation(KEY, (0, 0, 0), 2**32 - 1, 2)
    for nonce in [(2**32, 0, 0), (0, -1, 0), (0, 0, 2**32)]:
        with pytest.raises(OverflowError, match="nonce"):
            implementation(KEY, nonce, 0, 1)
    with pytest.raises(ValueError, match=r"31 bytes, expected 32.*new_key"):
        implementation(KEY[:31], (0, 0, 0), 0, 1)
    with pytest.raises(ValueError, match="first_block"):
        implementation(KEY, (0, 0, 0), -1, 1)


def test_torch_alone_gives_the_same_field():
    """Neither `cryptography` nor numpy is needed; the block is shown to work by the failing OpenSSL implementation."""
    script = """
import sys
sys.modules["cryptography"] = sys.modules["numpy"] = None
import hashlib
from fsdp_dp import chacha, noise
try:
    chacha.keystream_openssl(bytes(32), (0, 0, 0), 0, 1)
except ImportError:
    field = noise.standard_normal(noise.key_from_seed(1), release=3, parameter=1, start=5, count=3000)
    print(hashlib.sha256(repr(field.tolist()).encode()).hexdigest())
"""
    expected = hashlib.sha256(repr(normals(3, 1, 5, 3000).tolist()).encode()).hexdigest()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == expected, found.stderr


# Keys


def test_keys_differ_by_purpose_and_master_and_are_fresh():
    masters = [noise.key_from_seed(0), noise.key_from_seed(1), noise.key_from_seed(-1)]
    purposes = ["noise", "sampling", "sampling 1", "sampling 11", ""]
    derived = {noise.derive_key(master, purpose) for master in masters for purpose in purposes}
    assert len(derived | set(masters)) == len(masters) * (len(purposes) + 1)
    assert all(len(key) == 32 for key in derived)
    assert noise.derive_key(masters[0], "noise") == noise.derive_key(noise.key_from_seed(0), "noise")
    assert len({noise.new_key() for _ in range(100)}) == 100 and len(noise.new_key()) == 32
    with pytest.raises(ValueError, match="16 bytes, expected 32"):
        noise.derive_key(bytes(16), "noise")


# The field


def oracle_normal(release: int, parameter: int, element: int) -> float:
    """The value at one element, written from the layout in the contract, one element at a time."""
    chunk, r = divmod(element, 1024)
    slot, lane = divmod(r, 128)
    pair, is_second = divmod(slot, 2)
    nonce = (parameter, release & 0xFFFFFFFF, release >> 32)
    words = unsigned(chacha.keystream(KEY, nonce, chunk * 128 + lane, 1))[4 * pair : 4 * pair + 4]
    radius = math.sqrt(-2 * math.log(((words[1] << 32) + words[0] + 1) / 2**64))
    angle = 2 * math.pi * (((words[3] << 32) + words[2]) / 2**64)
    return radius * (math.sin(angle) if is_second else math.cos(angle))


@pytest.mark.parametrize(
    "element", [0, 1, 127, 128, 129, 255, 256, 700, 1023, 1024, 12345, 2**20 - 1, 2**31, 2**35 - 1]
)
def test_layout(element):
    """Against a scalar oracle, with a release number that needs both of its nonce words."""
    release, parameter = 2**32 * 5 + 7, 2**32 - 1
    found = normals(release, parameter, element, 1)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(oracle_normal(release, parameter, element), rel=1e-12, abs=1e-14)


def test_any_split_gives_the_same_bits():
    """Seen to fail with elements numbered from `start`, and with runs of 2^20 elements that do not join up."""
    whole = normals(release=3, parameter=2, start=0, count=2**20 + 5000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        start, stop = sorted(torch.randint(0, 20_000, (2,), generator=generator).tolist())
        assert torch.equal(normals(3, 2, start, stop - start), whole[start:stop])
    across = 2**20 - 700
    assert torch.equal(normals(3, 2, across, 5000), whole[across : across + 5000])
    assert torch.equal(normals(3, 2, 1023, 2**20 + 2), whole[1023 : 2**20 + 1025])
    assert normals(3, 2, 77, 0).shape == (0,)


def test_bits_do_not_depend_on_threads():
    before = torch.get_num_threads()
    fields = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        fields.append(normals(start=11, count=300_001))
    torch.set_num_threads(before)
    assert torch.equal(fields[0], fields[1]) and torch.equal(fields[0], fields[2])


def test_no_value_repeats():
    """10 releases x 5 parameters x 10 000 elements, half a million different values: no word serves twice.

    Seen to fail with the parameter left out of the nonce, and with words shared between neighbouring pairs of slots.
    """
    releases = [0, 1, 2, 3, 4, 5, 6, 2**32, 2**32 + 1, 2**63]
    field = torch.cat([normals(r, p, 0, 10_000) for r in releases for p in range(5)])
    assert field.unique().numel() == field.numel() == 500_000
    assert field.abs().unique().numel() == field.numel()


def test_numbers_out_of_range_raise():
    """Seen to fail with the checks removed: release 2^64 gave the noise of a smaller one."""
    assert normals(release=2**64 - 1, parameter=2**32 - 1, start=2**35 - 1, count=1).shape == (1,)
    for options, message in [
        ({"release": 2**64}, "release"),
        ({"release": -1}, "release"),
        ({"parameter": 2**32}, "parameter"),
        ({"parameter": -1}, "parameter"),
        ({"start": 2**35 - 1, "count": 2}, "element 34359738368"),
    ]:
        with pytest.raises(OverflowError, match=message):
            normals(**options)
    for options in ({"start": -1}, {"count": -1}):
        with pytest.raises(ValueError, match="at least 0"):
            normals(**options)


def test_field_is_standard_normal():
    """Mean, standard deviation, kurtosis and the Kolmogorov-Smirnov distance of a million values, within 4.5 sigma.

    Seen to fail with the radius off by 1 %, and with the angle over half a turn.
    """
    z = normals(release=1, count=2**20)
    n = z.numel()
    assert abs(z.mean()) < 4.5 / math.sqrt(n)
    assert abs(z.std() - 1) < 4.5 / math.sqrt(2 * n)
    assert abs((z**4).mean() - 3) < 4.5 * math.sqrt(96 / n)
    cdf = 0.5 * torch.erfc(-z.sort().values / math.sqrt(2))
    distance = (cdf - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max() + 0.5 / n
    assert distance * math.sqrt(n) < 2.0  # P < 7e-4 under the null; the key is fixed


def test_neighbours_are_independent():
    """Correlations of values and of squares over shards, lanes, slots, chunks, parameters and releases.

    Squares find a shared radius, which Box-Muller pairs would show if the radius were not Rayleigh. Seen to fail with
    words shared between neighbouring pairs of slots, and with the angle over a quarter turn.
    """
    n = 2**17
    z = normals(release=1, parameter=1, count=n + 1024)
    base = z[:n]
    others = {f"element + {lag}": z[lag : lag + n] for lag in (1, 2, 127, 128, 129, 256, 384, 512, 1023, 1024)}
    others |= {f"release {r}": normals(r, 1, 0, n) for r in (0, 2, 2**32 + 1)}
    others |= {f"parameter {p}": normals(1, p, 0, n) for p in (0, 2)}
    for name, other in others.items():
        for power in (1, 2):
            pair = torch.stack([base**power, other**power])
            assert abs(torch.corrcoef(pair)[0, 1]) < 4.5 / math.sqrt(n), (name, power)


def words_of_pair(radius: int, angle: int) -> torch.Tensor:
    """One chunk of keystream, zero but for pair 0 of lane 0, with these 64-bit integers."""
    words = torch.zeros(128, 16, dtype=torch.int64)
    words[0, :4] = torch.tensor([radius % 2**32, radius >> 32, angle % 2**32, angle >> 32])
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


@pytest.mark.parametrize(
    "integer", [0, 1, 2, 2**11 - 1, 2**31, 2**32 - 1, 2**32, 2**52 + 1, 2**53 + 1, 2**63, 2**64 - 2**12, 2**64 - 1]
)
def test_tail_uses_all_64_bits(integer):
    """The radius is sqrt(-2 ln((x + 1) / 2^64)) at every scale of x, up to 9.419; 32 bits end at 6.66, 53 at 8.57.

    Seen to fail with u truncated to 53 bits below the point, and with the high word alone.
    """
    found = noise._normals_of_chunks(words_of_pair(integer, angle=0))[0].item()
    u = (integer + 1) / 2**64
    assert found == pytest.approx(math.sqrt(-2 * math.log(u)), rel=1e-14)
    assert found <= noise.MAX_NORMAL


def test_tail_reaches_its_end_and_no_further():
    largest = noise._normals_of_chunks(words_of_pair(0, angle=0))[0].item()
    assert largest == pytest.approx(math.sqrt(128 * math.log(2)), rel=1e-15)
    assert 9.419 < largest < noise.MAX_NORMAL
    smallest = noise._normals_of_chunks(words_of_pair(2**64 - 1, angle=2**62))
    assert torch.isfinite(smallest).all() and smallest[0] == 0


@pytest.mark.parametrize(
    ("eighths", "cos", "sin"), [(0, 1, 0), (2, 0, 1), (3, -1, 1), (4, -1, 0), (6, 0, -1), (7, 1, -1)]
)
def test_angle_goes_once_around(eighths, cos, sin):
    pair = noise._normals_of_chunks(words_of_pair(2**63, angle=eighths * 2**61))
    radius, scale = math.sqrt(2 * math.log(2)), math.hypot(cos, sin)
    assert pair[0].item() == pytest.approx(radius * cos / scale, abs=1e-15)
    assert pair[128].item() == pytest.approx(radius * sin / scale, abs=1e-15)


# The lattice

MECHANISMS = list(itertools.product([1.0, 0.7, 3e-5, 1e4], [1.0, 0.37, 20.0], [1, 37, 512, 2**20]))


def lattice(max_grad_norm: float = 0.7, noise_multiplier: float = 1.3, expected_batch_size: int = 64) -> Lattice:
    return Lattice.for_release(
        max_grad_norm=max_grad_norm, noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size
    )


def units(grid: Lattice, released: torch.Tensor) -> torch.Tensor:
    """Released values in units of the spacing; asserts that they are whole multiples of it, as float64 rounds them."""
    found = (released / grid.spacing).round()
    assert torch.equal(found * grid.spacing, released)
    return found


@pytest.mark.parametrize(("max_grad_norm", "noise_multiplier", "batch"), MECHANISMS)
def test_largest_sum_and_noise_are_exact(max_grad_norm, noise_multiplier, batch):
    grid = lattice(max_grad_norm, noise_multiplier, batch)
    std = noise_multiplier * max_grad_norm
    assert grid.clamp == (4 * batch + 64) * max_grad_norm
    assert (grid.clamp + noise.MAX_NORMAL * std) / grid.spacing < 2**50
    assert math.frexp(std / grid.spacing)[0] == 0.5
    largest = torch.full((2,), torch.finfo(torch.float64).max, dtype=torch.float64) * torch.tensor([1, -1])
    tails = torch.full((2,), 9.4192, dtype=torch.float64) * torch.tensor([1, -1])
    released = grid.privatize(largest, tails, std)
    assert abs(released.sum()) <= 2 * grid.spacing
    assert released[0].item() == pytest.approx(grid.clamp + 9.4192 * std, rel=1e-12)
    # Fine enough: a billion elements add less than a thousandth of R to the sensitivity, at the usual sigma and batch.
    if batch <= 512 and noise_multiplier <= 1:
        assert grid.sensitivity_charge(10**9) < 1e-3 * max_grad_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_release_is_sum_plus_noise_in_whole_units(dtype):
    """The noise in units does not depend on the sum, and the sum of the two is exact.

    Seen to fail with noise added before rounding, and with `sum + noise_std * xi` in floating point.
    """
    grid, std = lattice(), 1.3 * 0.7
    clipped_sum = (5 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))).to(dtype)
    xi = normals(count=10_000)
    kept = clipped_sum.clone(), xi.clone()
    released = units(grid, grid.privatize(clipped_sum, xi, std))
    noise_alone = units(grid, grid.privatize(torch.zeros_like(clipped_sum), xi, std))
    sum_alone = units(grid, grid.privatize(clipped_sum, torch.zeros_like(xi), std))
    assert torch.equal(released, sum_alone + noise_alone)
    assert (noise_alone - xi * (std / grid.spacing)).abs().max() <= 0.5
    assert (sum_alone - clipped_sum.double() / grid.spacing).abs().max() <= 0.75
    assert torch.equal(clipped_sum, kept[0]) and torch.equal(xi, kept[1])


def test_rounding_costs_no_more_than_the_charge():
    """Neighbouring sums, also ones made to round apart in every element, stay within |S - S'| + charge.

    Seen to fail with `sensitivity_charge` halved.
    """
    grid, dimension = lattice(), 10_000
    charge = grid.sensitivity_charge(dimension)
    no_noise = torch.zeros(dimension, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-(10**12), 10**12, (dimension,), generator=generator).double()
    for low, high in [(0.4999, 0.5001), (-0.5001, 0.5001), (0.0, 0.3)]:
        near, far = (whole + low) * grid.spacing, (whole + high) * grid.spacing
        moved = grid.privatize(near, no_noise, 0.0) - grid.privatize(far, no_noise, 0.0)
        assert moved.norm() <= (near - far).norm() + charge
    apart = grid.privatize((whole + 0.4999) * grid.spacing, no_noise, 0.0) - grid.privatize(
        (whole + 0.5001) * grid.spacing, no_noise, 0.0
    )
    assert apart.norm() > 0.6 * charge


def test_clamp_is_a_projection():
    """Elementwise: within the bound nothing moves, beyond it only to the bound. Seen to fail without the clamp."""
    grid, no_noise = lattice(), torch.zeros(3, dtype=torch.float64)
    big = torch.tensor([grid.clamp - 0.1, grid.clamp + 5.0, -math.inf], dtype=torch.float64)
    expected = torch.tensor([grid.clamp - 0.1, grid.clamp, -grid.clamp], dtype=torch.float64)
    assert torch.allclose(grid.privatize(big, no_noise, 0.0), expected, rtol=0, atol=grid.spacing)


def test_low_bits_show_no_pattern():
    """Odd and even units are equally likely, also where the grid of a float64 normal is as coarse as 1/16 unit.

    Otherwise the parity of the output tells the parity of the un-noised sum. Seen to fail with round-half-to-even.
    """
    grid = Lattice(spacing=2.0**-48, clamp=1.0)
    xi = normals(count=2**18)
    xi = xi[(xi.abs() >= 0.5) & (xi.abs() < 3.9)]
    parity = units(grid, grid.privatize(torch.zeros_like(xi), xi, 1.0)).remainder(2)
    assert abs(parity.mean() - 0.5) < 4.5 * 0.5 / math.sqrt(xi.numel())


def test_noise_scale_must_fit_the_lattice():
    grid = lattice()
    zeros = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"noise_std: found 0.92.*for_release"):
        grid.privatize(zeros, zeros, 0.92)
    with pytest.raises(ValueError, match=r"expected torch.float64 \[4\]"):
        grid.privatize(zeros, zeros.float(), 1.3 * 0.7)
    with pytest.raises(ValueError, match="noise_flat"):
        grid.privatize(zeros, zeros[:1], 1.3 * 0.7)


@pytest.mark.parametrize("where", ["sum", "noise"])
@pytest.mark.parametrize("value", [math.nan, 2.0**20])
def test_what_is_not_exact_is_not_released(where, value):
    """A NaN anywhere, or noise beyond its bound, raises (a large sum is clamped). Seen to fail without the check."""
    grid = lattice()
    values = {name: torch.zeros(4, dtype=torch.float64) for name in ("sum", "noise")}
    values[where][2] = value
    if where == "sum" and not math.isnan(value):
        assert grid.privatize(values["sum"], values["noise"], 1.3 * 0.7)[2].item() == pytest.approx(grid.clamp)
        return
    with pytest.raises(FloatingPointError, match="Nothing was released"):
        grid.privatize(values["sum"], values["noise"], 1.3 * 0.7)


def test_no_noise_for_debugging_keeps_the_sum():
    grid = lattice(noise_multiplier=0.0)
    clipped_sum = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    released = grid.privatize(clipped_sum, torch.zeros_like(clipped_sum), 0.0)
    assert (released - clipped_sum).abs().max() <= grid.spacing < 1e-11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm > 0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm > 0"),
        ({"max_grad_norm": 1e-300}, "float64's range"),
        ({"noise_multiplier": -1.0}, "noise_multiplier >= 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier >= 0"),
        ({"noise_multiplier": 1e-12}, "too small to be exact"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
    ],
)
def test_lattice_refuses_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        lattice(**options)


def test_single_elements_are_those_of_the_field() -> None:
    """Seen to fail when the slot, the lane or the release's high word is left out."""
    generator = torch.Generator().manual_seed(3)
    release = 2**33 + 5
    elements = [0, 1, 127, 128, 895, 1023, 1024, 2**35 - 1, *torch.randint(2**35, (40,), generator=generator).tolist()]
    places = [(number % 7 * 2**29 + 1, element) for number, element in enumerate(elements)]
    found = noise.normals_at(KEY, release=release, places=places)
    expected = [noise.standard_normal(KEY, release=release, parameter=p, start=e, count=1) for p, e in places]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-14, atol=0)
    assert noise.normals_at(KEY, release=0, places=[]).shape == (0,)
    with pytest.raises(OverflowError, match="past 2\\^35"):
        noise.normals_at(KEY, release=0, places=[(0, 0), (0, 2**35)])
    with pytest.raises(ValueError, match="32"):
        noise.normals_at(KEY[1:], release=0, places=[(0, 0)])
