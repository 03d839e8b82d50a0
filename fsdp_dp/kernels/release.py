"""The release of all local shards at once: noise on the lattice, division, cast; the accumulators are used up.

In the step: the engine's last act before ``p.grad`` is published. `privatize_all_` chooses between Triton launches for
all shards (`chacha_normal`) and `privatize_all_in_torch_`, which says in a few lines what the kernel computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdp_dp import kernels, noise


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One parameter's local shard in a release.

    Attributes:
        accumulator: clipped sum, flat and contiguous, float32 or float64.
        out: where its private gradient is written: as many elements, flat and contiguous, any floating dtype. It may be
            the accumulator itself.
        parameter: canonical index of the parameter, part of the noise nonce.
        start, count: the run of global elements that the shard is, or lies in.
        columns: (width, offset, size) if the shard is columns `offset .. offset + size` of the run seen as rows of
            `width` (`sharding.Region`).
    """

    accumulator: Tensor
    out: Tensor
    parameter: int
    start: int
    count: int
    columns: tuple[int, int, int] | None = None

    @property
    def in_place(self) -> bool:
        return self.out.data_ptr() == self.accumulator.data_ptr()


class Verdict:
    """Whether a release on a GPU was exact: known once the device has come to it, asked for without making it wait.

    Until then nothing is lost: the gradients of a release that was not are zeros.
    """

    def __init__(self, inexact: Tensor | None = None) -> None:
        self._flag: Tensor | None = None
        if inexact is not None and inexact.is_cuda:
            self._flag = torch.empty(1, dtype=inexact.dtype, pin_memory=True)
            self._flag.copy_(inexact, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        elif inexact is not None:
            self._flag = inexact

    def check(self) -> None:
        """Wait for the answer.

        Raises:
            FloatingPointError: an element was not an exact number of lattice units.
        """
        if self._flag is None:
            return
        if hasattr(self, "_copied"):
            self._copied.synchronize()
        if int(self._flag):
            raise FloatingPointError(
                "release: an element is not an exact number of lattice units; the clipped sum holds NaN. Nothing was "
                "released: the gradients are zeros"
            )


def privatize_all_(
    segments: Sequence[Segment],
    *,
    key: bytes,
    release: int,
    lattice: noise.Lattice,
    noise_std: float,
    divisor: float,
    later: Iterable[Sequence[Segment]] = (),
) -> Verdict:
    """Write each segment's noised sum, divided by `divisor`, into its `out`, and zeros into an accumulator beside it.

    Args:
        segments: on one device, none overlapping another.
        key: 32 secret bytes, used for noise only.
        release: number of the release, in [0, 2^64).
        lattice: made for this noise multiplier and clipping bound.
        noise_std: sigma * R; at 0.0 there is no noise, no lattice and no privacy.
        divisor: the expected batch size.
        later: more of them, each part asked for once those before are on their way (their sums still travel until then).

    Raises:
        ValueError: a tensor, or `noise_std`, is not as described.
        OverflowError: the release, a parameter index or an element does not fit its counter.
        FloatingPointError: a result is not an exact number of lattice units; nothing may be released. On a GPU that is
            what the `Verdict` raises, and gradients are zeros.

    **Formal guarantee.** That of `noise.Lattice` with the normals of `noise.standard_normal`, on every element.
    """
    parts = _not_empty(itertools.chain([segments], later))
    first = next(parts, [])
    if first and noise_std > 0 and kernels.available(first[0].out.device):
        from fsdp_dp.kernels import chacha_normal as implementation

        return Verdict(
            implementation.privatize_all_(
                first, key=key, release=release, lattice=lattice, noise_std=noise_std, divisor=divisor, later=parts
            )
        )
    for part in itertools.chain([first], parts):
        privatize_all_in_torch_(part, key=key, release=release, lattice=lattice, noise_std=noise_std, divisor=divisor)
    return Verdict()


def _not_empty(parts: Iterable[Sequence[Segment]]) -> Iterator[Sequence[Segment]]:
    for part in parts:
        if kept := [segment for segment in part if segment.out.numel()]:
            yield kept


def privatize_all_in_torch_(
    segments: Sequence[Segment], *, key: bytes, release: int, lattice: noise.Lattice, noise_std: float, divisor: float
) -> None:
    """`privatize_all_` in torch operations, on any device; the reference for the kernel."""
    for segment in segments:
        total = segment.accumulator.double()
        if noise_std > 0:
            run = noise.standard_normal(
                key,
                release=release,
                parameter=segment.parameter,
                start=segment.start,
                count=segment.count,
                device=total.device,
            )
            total = lattice.privatize(total, select(run, segment.columns), noise_std)
        segment.out.copy_(total / divisor)
        if not segment.in_place:
            segment.accumulator.zero_()


def select(run: Tensor, columns: tuple[int, int, int] | None) -> Tensor:
    """The elements of a run that a shard with these `columns` holds, flat."""
    if columns is None:
        return run
    width, offset, size = columns
    return run.view(-1, width)[:, offset : offset + size].reshape(-1)
