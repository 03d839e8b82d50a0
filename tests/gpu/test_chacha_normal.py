"""The release kernel on a GPU: the RFC's bits, the reference's normals and gradients, NaN found, nothing left unwritten."""

import dataclasses

import pytest
import torch

from fsdp_dp import chacha, noise
from fsdp_dp.kernels.release import Segment, privatize_all_, privatize_all_in_torch_

pytestmark = pytest.mark.gpu(1)

KEY = noise.key_from_seed(3)
RELEASE = 2**40 + 7
STD = 1.3 * 0.7
LATTICE = noise.Lattice.for_release(max_grad_norm=1.3, noise_multiplier=0.7, expected_batch_size=512)
ARGUMENTS = {"key": KEY, "release": RELEASE, "lattice": LATTICE, "noise_std": STD, "divisor": 512.0}


def segments(accumulator: torch.dtype, out: torch.dtype) -> list[Segment]:
    """Whole chunks and parts, beyond 2^33, column shards, an empty one, one across a chunk's end; outputs poisoned."""
    generator = torch.Generator().manual_seed(1)
    ranges = [
        (0, 100_000, None),
        (7, 3001, None),
        (2**33 + 24 * 7, 24 * 5000, (24, 6, 7)),
        (3, 0, None),
        (1023, 2, None),
        (768 * 5, 768 * 300, (768, 384, 384)),
        (3 * 1024, 9 * 1024, None),
        (1023, 5 * 1024 + 2, None),
    ]
    made = []
    for parameter, (start, count, columns) in enumerate(ranges):
        numel = count if columns is None else count // columns[0] * columns[2]
        total = 10 * torch.randn(numel, generator=generator, dtype=torch.float64)
        made.append(
            Segment(
                accumulator=total.to("cuda", accumulator),
                out=torch.full((numel,), torch.nan, dtype=out, device="cuda"),
                parameter=parameter,
                start=start,
                count=count,
                columns=columns,
            )
        )
    return made


def on_cpu(segment: Segment) -> Segment:
    return dataclasses.replace(segment, accumulator=segment.accumulator.cpu(), out=segment.out.cpu())


def test_keystream_is_the_rfcs_and_the_references() -> None:
    """RFC 8439 section 2.3.2, then counters across the sign bit and up to the last."""
    from fsdp_dp.kernels import chacha_normal

    nonce = tuple(int.from_bytes(bytes.fromhex("000000090000004a00000000")[i : i + 4], "little") for i in (0, 4, 8))
    block = chacha_normal.keystream(bytes(range(32)), nonce, 1, 1, "cuda")[0].tolist()
    assert [hex(word % 2**32) for word in (block[0], block[15])] == ["0xe4e7f110", "0x4e3c50a2"]
    for first, blocks in [(0, 1), (1, 3000), (2**31 - 3, 700), (2**32 - 5, 5), (9, 0)]:
        found = chacha_normal.keystream(KEY, (1, 2**32 - 1, 5), first, blocks, "cuda")
        assert torch.equal(found.cpu(), chacha.keystream_torch(KEY, (1, 2**32 - 1, 5), first, blocks))


@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (5, 3000), (1023, 2), (2**33 + 77, 300_005), (noise.MAX_ELEMENTS - 7, 7), (4, 0)]
)
def test_normals_are_the_references(start: int, count: int) -> None:
    from fsdp_dp.kernels import chacha_normal

    where = {"release": RELEASE, "parameter": 16, "start": start, "count": count}
    found, expected = (
        chacha_normal.standard_normal(KEY, device="cuda", **where).cpu(),
        noise.standard_normal(KEY, **where),
    )
    assert found.shape == expected.shape and found.dtype == torch.float64
    assert ((found - expected).abs() <= 1e-15 * expected.abs().clamp(min=2)).all()


@pytest.mark.parametrize(
    ("accumulator", "out"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_gradients_are_the_references(accumulator: torch.dtype, out: torch.dtype) -> None:
    """Equal in narrow formats; in float64 whole lattice units, one off at most where log, cos and sin round otherwise."""
    found = segments(accumulator, out)
    expected = [on_cpu(segment) for segment in found]
    privatize_all_(found, **ARGUMENTS)
    privatize_all_in_torch_(expected, **ARGUMENTS)
    unit = LATTICE.spacing / 512
    for mine, reference in zip(found, expected, strict=True):
        off = (mine.out.cpu().double() - reference.out.double()).abs()
        assert (off <= 1.01 * unit).all() if out == torch.float64 else (off != 0).sum() <= 0.001 * off.numel()
        assert off.isfinite().all() and not mine.accumulator.any()


def test_sums_may_be_overwritten_by_their_gradients() -> None:
    """All sums of a chunk are read before one of its gradients is written."""
    beside, within = segments(torch.float32, torch.float32), segments(torch.float32, torch.float32)
    within = [dataclasses.replace(segment, out=segment.accumulator) for segment in within]
    privatize_all_(beside, **ARGUMENTS)
    privatize_all_(within, **ARGUMENTS)
    assert all(torch.equal(a.out, b.accumulator) for a, b in zip(beside, within, strict=True))


def test_one_segment_or_many_give_the_same_bits() -> None:
    whole, split = segments(torch.float32, torch.float64)[:1], []
    for start, stop in [(0, 1), (1, 70_000), (70_000, 100_000)]:
        part = dataclasses.replace(
            whole[0],
            accumulator=whole[0].accumulator[start:stop].clone(),
            out=torch.empty_like(whole[0].out[start:stop]),
            start=start,
            count=stop - start,
        )
        split.append(part)
    privatize_all_(whole, **ARGUMENTS)
    privatize_all_(split, **ARGUMENTS)
    assert torch.equal(whole[0].out, torch.cat([part.out for part in split]))


def test_nan_releases_nothing_and_infinity_is_clamped() -> None:
    broken = segments(torch.float32, torch.float32)
    broken[1].accumulator[17] = torch.nan
    with pytest.raises(FloatingPointError, match="Nothing was released"):
        privatize_all_(broken, **ARGUMENTS).check()
    assert not any(segment.out.any() for segment in broken)

    huge = segments(torch.float32, torch.float32)
    huge[1].accumulator[17] = torch.inf
    privatize_all_(huge, **ARGUMENTS).check()
    assert abs(huge[1].out[17].item() - LATTICE.clamp / 512) < 10 * STD / 512
