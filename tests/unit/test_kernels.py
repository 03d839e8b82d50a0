"""The release and its kernel without a GPU: the torch way everywhere, the Triton way in Triton's interpreter.

The interpreter runs the kernels on CPU tensors with numpy. It is slow, so ranges are short, and it does not round to
bfloat16 as a GPU does; tests/gpu/test_chacha_normal.py has the rest.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from fsdp_dp import chacha, kernels, noise
from fsdp_dp.kernels.release import Segment, Verdict, privatize_all_, privatize_all_in_torch_, select
from tests.unit.interpreted import interpreter

KEY = noise.key_from_seed(3)
RELEASE = 2**40 + 7
STD = 1.3 * 0.7
LATTICE = noise.Lattice.for_release(max_grad_norm=1.3, noise_multiplier=0.7, expected_batch_size=512)
ARGUMENTS = {"key": KEY, "release": RELEASE, "lattice": LATTICE, "noise_std": STD, "divisor": 512.0}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """`chacha_normal` as Triton's interpreter sees it; the flag is read where kernels are defined and called."""
    with interpreter():
        from fsdp_dp.kernels import chacha_normal

        yield chacha_normal


def segments(accumulator: torch.dtype = torch.float32, out: torch.dtype = torch.float32) -> list[Segment]:
    """Unaligned, beyond 2^33, columns, across the end of a chunk; outputs poisoned."""
    generator = torch.Generator().manual_seed(1)
    ranges = [(7, 300, None), (2**33 + 24 * 7, 24 * 20, (24, 6, 7)), (1023, 2, None)]
    made = []
    for parameter, (start, count, columns) in enumerate(ranges):
        numel = count if columns is None else count // columns[0] * columns[2]
        made.append(
            Segment(
                accumulator=10 * torch.randn(numel, generator=generator, dtype=accumulator),
                out=torch.full((numel,), torch.nan, dtype=out),
                parameter=parameter,
                start=start,
                count=count,
                columns=columns,
            )
        )
    return made


def copies(originals: list[Segment]) -> list[Segment]:
    return [dataclasses.replace(s, accumulator=s.accumulator.clone(), out=s.out.clone()) for s in originals]


# ---------------------------------------------------------------------------------------------------- the torch way


def test_a_release_is_noise_on_the_lattice_divided() -> None:
    made = segments()
    expected = copies(made)
    privatize_all_(made, **ARGUMENTS)
    for segment, before in zip(made, expected, strict=True):
        run = noise.standard_normal(
            KEY, release=RELEASE, parameter=segment.parameter, start=segment.start, count=segment.count
        )
        noised = LATTICE.privatize(before.accumulator, select(run, segment.columns), STD)
        assert torch.equal(segment.out, (noised / 512).float())
        assert not segment.accumulator.any()


def test_without_noise_there_is_no_lattice() -> None:
    made = segments()
    sums = [segment.accumulator.double() for segment in made]
    privatize_all_(made, **{**ARGUMENTS, "noise_std": 0.0})
    for segment, total in zip(made, sums, strict=True):
        assert torch.equal(segment.out, (total / 512).float())
        assert not segment.accumulator.any()


def test_empty_segments_are_no_work() -> None:
    nothing = Segment(accumulator=torch.empty(0), out=torch.empty(0), parameter=0, start=0, count=0)
    privatize_all_([nothing], **ARGUMENTS)
    privatize_all_([], **ARGUMENTS)


def test_columns_of_a_run() -> None:
    run = torch.arange(12)
    assert select(run, None) is run
    assert select(run, (4, 1, 2)).tolist() == [1, 2, 5, 6, 9, 10]


def test_cpu_needs_no_triton() -> None:
    """In a fresh interpreter: importing the engine and releasing on CPU load no Triton. `torch` itself may name it."""
    script = """
import sys
import torch
from fsdp_dp import noise
from fsdp_dp.kernels.release import Segment, privatize_all_
import fsdp_dp.engine
before = "triton" in sys.modules
lattice = noise.Lattice.for_release(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
segment = Segment(accumulator=torch.ones(5), out=torch.empty(5), parameter=0, start=0, count=5)
privatize_all_([segment], key=bytes(32), release=1, lattice=lattice, noise_std=1.0, divisor=4.0)
print("fsdp_dp.kernels.chacha_normal" in sys.modules, before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_kernels_are_for_cuda_devices_only() -> None:
    assert not kernels.available(torch.device("cpu"))
    assert kernels.available(torch.device("cuda", 0)) is (find_spec("triton") is not None)


# --------------------------------------------------------------------------------------------------- the Triton way


def test_interpreted_keystream_is_the_rfcs_and_the_references(interpreted: ModuleType) -> None:
    """RFC 8439 section 2.3.2, then counters across the sign bit and up to the last."""
    block = interpreted.keystream(bytes(range(32)), (0x09000000, 0x4A000000, 0), 1, 1, "cpu")[0].tolist()
    assert [hex(word % 2**32) for word in (block[0], block[15])] == ["0xe4e7f110", "0x4e3c50a2"]
    for first, blocks in [(1, 200), (2**31 - 3, 7), (2**32 - 5, 5), (9, 0)]:
        found = interpreted.keystream(KEY, (1, 2**32 - 1, 5), first, blocks, "cpu")
        assert torch.equal(found, chacha.keystream_torch(KEY, (1, 2**32 - 1, 5), first, blocks))


def test_interpreted_keystream_refuses_to_repeat_itself(interpreted: ModuleType) -> None:
    with pytest.raises(OverflowError, match="block counter"):
        interpreted.keystream(KEY, (0, 0, 0), 2**32 - 1, 2, "cpu")


@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (5, 1500), (2**33 + 77, 200), (noise.MAX_ELEMENTS - 7, 7), (4, 0)]
)
def test_interpreted_normals_are_the_references(interpreted: ModuleType, start: int, count: int) -> None:
    """Seen to fail with constants that Triton rounds to float32 (by 1e-9), as it does for arguments of `tl.fma`."""
    where = {"release": RELEASE, "parameter": 16, "start": start, "count": count}
    found, expected = interpreted.standard_normal(KEY, device="cpu", **where), noise.standard_normal(KEY, **where)
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= 1e-15 * expected.abs().clamp(min=2)).all()


def test_interpreted_normals_refuse_what_the_counters_cannot_hold(interpreted: ModuleType) -> None:
    with pytest.raises(OverflowError, match="noise would"):
        interpreted.standard_normal(KEY, release=0, parameter=0, start=noise.MAX_ELEMENTS, count=1, device="cpu")


@pytest.mark.parametrize(
    ("accumulator", "out"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.float16)],
    ids=str,
)
def test_interpreted_release_is_the_references(
    interpreted: ModuleType, accumulator: torch.dtype, out: torch.dtype
) -> None:
    """In lattice units: within one, where log, cos, sin or the quotient round otherwise."""
    found = segments(accumulator, out)
    expected = copies(found)
    interpreted.privatize_all_(found, **ARGUMENTS)
    privatize_all_in_torch_(expected, **ARGUMENTS)
    for mine, reference in zip(found, expected, strict=True):
        off = (mine.out.double() - reference.out.double()).abs()
        assert (off <= 1.01 * LATTICE.spacing / 512).all() if out == torch.float64 else (off == 0).float().mean() > 0.99
        assert off.isfinite().all() and not mine.accumulator.any()


def test_interpreted_release_finds_nan_and_clamps_infinity(interpreted: ModuleType) -> None:
    broken = segments()
    broken[1].accumulator[17] = torch.nan
    with pytest.raises(FloatingPointError, match="Nothing was released"):
        Verdict(interpreted.privatize_all_(broken, **ARGUMENTS)).check()
    assert not any(segment.out.any() for segment in broken)

    huge = segments()
    huge[1].accumulator[17] = -torch.inf
    Verdict(interpreted.privatize_all_(huge, **ARGUMENTS)).check()
    assert abs(huge[1].out[17].item() + LATTICE.clamp / 512) < 10 * STD / 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulator": torch.zeros(3)}, "accumulator: found"),
        ({"out": torch.zeros(3, dtype=torch.int32)}, "out: found torch.int32"),
        ({"out": torch.zeros(8)[::2]}, "out: found"),
        ({"columns": (4, 3, 2)}, "columns: found"),
    ],
    ids=["numel", "dtype", "stride", "columns"],
)
def test_interpreted_release_refuses(interpreted: ModuleType, change: dict[str, object], message: str) -> None:
    good = Segment(accumulator=torch.zeros(4), out=torch.zeros(4), parameter=0, start=0, count=4)
    with pytest.raises(ValueError, match=message):
        interpreted.privatize_all_([dataclasses.replace(good, **change)], **ARGUMENTS)
    with pytest.raises(ValueError, match="noise_std"):
        interpreted.privatize_all_([good], **{**ARGUMENTS, "noise_std": 0.9})
