"""Guards of a release: what the accountant assumes about noise and sums, looked at while training runs; yes or no.

At the first release after the keys are drawn, and at every thousandth, all ranks ask before anything is published:

* tiling: do the local shards hold every trainable element, and each equally often?
* sum: is the clipped sum no longer than the rows that are in it, times R?
* source: do normals of this release have the variance of normals? At one false alarm in 10^12.
* noise: is what is about to be released, at the first, last and some elements of every shard, the clipped sum plus the
  noise of exactly that element, drawn once and scaled by the accounted sigma R?

A healthy engine always answers yes, so that an answer tells nothing about data or noise. The noise is drawn again for
this, on the CPU: no second look is had at it by anyone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fsdp_dp import noise
from fsdp_dp.errors import PrivacyError
from fsdp_dp.kernels.release import Segment
from fsdp_dp.sharding import ManagedParameter, Region, ShardedModel

EVERY = 1000
_INSIDE = 2  # elements that are looked at, of a shard, besides its first and its last
_NORMALS = 4096
_DEVIATIONS = 8.0  # of the mean square of so many normals: beyond it once in 10^12
_RELATIVE = 1e-2  # of a sum's norm: more than numerics="nominal" in bfloat16 is usually off by


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What one release is to add, from the accounted numbers."""

    key: bytes
    release: int
    lattice: noise.Lattice
    noise_std: float
    divisor: float


class ReleaseGuard:
    """Asks every `EVERY` releases. `rows` counts the rows of a release that is to be looked at."""

    def __init__(self, model: ShardedModel) -> None:
        self._model = model
        self._releases = 0
        self.rows = torch.zeros((), dtype=torch.float64, device=model.device)

    @property
    def due(self) -> bool:
        return self._releases % EVERY == 0

    def restart(self) -> None:
        """New keys: the next release is looked at again."""
        self._releases = 0

    def pass_first_release(self) -> None:
        """As if it had been looked at."""
        self._releases = 1

    def count(self, mask_B: Tensor) -> None:
        """Rows of one microbatch that take part."""
        if self.due:
            self.rows += mask_B.sum()

    def before(self, segments: Sequence[Segment], bound: float) -> list[Tensor]:
        """Look at the sums; some of their elements, to be given to `after`."""
        if not self.due:
            return []
        copies = self._check_tiling()
        self._check_sum(copies, bound)
        return [s.accumulator[_sites(s.out.numel(), s.accumulator.device)].cpu().double() for s in segments]

    def after(self, segments: Sequence[Segment], sums: Sequence[Tensor], mechanism: Mechanism) -> None:
        """Look at what is about to be published.

        Raises:
            PrivacyError: on all ranks, since none may publish what another has found to be wrong.
        """
        self._releases += 1
        if not sums:
            return
        source = mechanism.noise_std == 0 or _is_normal(segments, mechanism)
        wrong = [s.parameter for s, sum_K in zip(segments, sums, strict=True) if not _is_noised(s, sum_K, mechanism)]
        if self._model.any_rank(bool(wrong) or not source):
            names = {p.index: p.name for p in self._model.parameters}
            where = f"in {', '.join(names[i] for i in wrong[:3])}" if wrong else "by the source, or on another rank"
            refuse(f"the noise of release {mechanism.release} is not what is accounted for, {where}")

    def _check_tiling(self) -> dict[str, int]:
        """How many ranks hold each element, by parameter."""
        parameters = self._model.parameters
        found = torch.tensor([_footprint(p) for p in parameters], dtype=torch.int64, device=self._model.device)
        for group in self._model.groups:
            dist.all_reduce(found, group=group)
        copies = {}
        for p, (held, places) in zip(parameters, found.tolist(), strict=True):
            copies[p.name] = held // p.numel
            if held % p.numel or copies[p.name] < 1 or (places - copies[p.name] * _sum_of_places(p.numel)) % 2**64:
                refuse(f"the ranks' shards of '{p.name}' do not hold each of its {p.numel} elements equally often")
        return copies

    def _check_sum(self, copies: dict[str, int], bound: float) -> None:
        square = torch.zeros((), dtype=torch.float64, device=self._model.device)
        for p in self._model.parameters:
            square += p.accumulator.double().square().sum().to(square.device) / copies[p.name]
        square, rows = self._model.sum_over_data(torch.stack([square, self.rows])).tolist()
        self.rows.zero_()
        if math.sqrt(square) > rows * bound * (1 + _RELATIVE):
            refuse(f"the clipped sum is longer than max_grad_norm={bound:g} for each of its rows")


def refuse(what: str) -> NoReturn:
    raise PrivacyError(
        f"Nothing was released: {what}. This is a fault of fsdp_dp, or of what replaces a part of it: do not train on, "
        "and report it with engine.summary()"
    )


def _footprint(parameter: ManagedParameter) -> tuple[int, int]:
    """Of the elements that this rank holds: how many, and the sum of their places, modulo 2^64."""
    region: Region = parameter.region
    width, offset, size = region.columns or (region.count or 1, 0, region.count or 1)
    rows = region.count // width
    places = rows * size * (region.start + offset) + size * width * _sum_of_places(rows) + rows * _sum_of_places(size)
    return region.numel, (places + 2**63) % 2**64 - 2**63


def _sum_of_places(count: int) -> int:
    return count * (count - 1) // 2


def _sites(numel: int, device: torch.device) -> Tensor:
    """Places in a shard that are looked at: the first, the last, and some between."""
    return torch.linspace(0, numel - 1, _INSIDE + 2, dtype=torch.float64).long().unique().to(device)


def _is_normal(segments: Sequence[Segment], mechanism: Mechanism) -> bool:
    first = max(segments, key=lambda segment: segment.count, default=None)
    if first is None or not first.count:
        return True
    count = min(_NORMALS, first.count)
    xi = noise.standard_normal(
        mechanism.key, release=mechanism.release, parameter=first.parameter, start=first.start, count=count
    )
    # A chi-square variable of few degrees of freedom has a longer tail than a normal one: Laurent and Massart (2000).
    x = _DEVIATIONS**2 / 2
    low, high = count - 2 * math.sqrt(count * x), count + 2 * math.sqrt(count * x) + 2 * x
    return low <= float(xi.square().sum()) <= high


def _is_noised(segment: Segment, sum_K: Tensor, mechanism: Mechanism) -> bool:
    """Whether the elements at `_sites` are the sum and their own noise; equal but for the cast to their dtype."""
    sites = _sites(segment.out.numel(), torch.device("cpu"))
    if not len(sites):
        return True
    expected = sum_K
    if mechanism.noise_std:
        xi = [
            noise.standard_normal(
                mechanism.key, release=mechanism.release, parameter=segment.parameter, start=_place(segment, i), count=1
            )
            for i in sites.tolist()
        ]
        expected = mechanism.lattice.privatize(sum_K, torch.cat(xi), mechanism.noise_std)
    expected = expected / mechanism.divisor
    found = segment.out.view(-1)[sites.to(segment.out.device)].cpu().double()
    slack = 2 * torch.finfo(segment.out.dtype).eps * expected.abs() + 2.0**-30 * mechanism.noise_std / mechanism.divisor
    return bool(((found - expected).abs() <= slack).all())


def _place(segment: Segment, i: int) -> int:
    """The element of the whole parameter that is the i-th of a shard."""
    if segment.columns is None:
        return segment.start + i
    width, offset, size = segment.columns
    return segment.start + i // size * width + offset + i % size
