"""Guards of a release: what the accountant assumes about noise and sums, looked at while training runs; yes or no.

At the first, tenth and hundredth release after the keys are drawn, and at every thousandth, all ranks ask, before anything
is published:

* tiling: do the local shards hold every trainable element, and each equally often?
* rows: are they as many, over all ranks, as the loader's draws have?
* sum: is the clipped sum in a wide format, and no longer than the rows that are in it, times R?
* source: do normals of this release have the variance of normals? At one false alarm in 10^12.
* noise: is what is about to be released, at the first, last and some elements of every shard, the clipped sum plus the
  noise of exactly that element, drawn once and scaled by the accounted sigma R? Is it, as a whole, as long as the sum and
  that much noise are together?

And of every release: was it counted, and is its noise at least the accounted sigma R?

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
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.draw_guard import is_unlikely
from fsdp_dp.errors import PrivacyError
from fsdp_dp.kernels.release import Segment
from fsdp_dp.sharding import ManagedParameter, Region, ShardedModel

EVERY, EARLY = 1000, (0, 9, 99)  # of releases before; the first alone sees nothing that one leaves behind for the next
_INSIDE = 2  # elements that are looked at, of a shard, besides its first and its last
_NORMALS = 4096
_TAIL = 28.0  # minus the logarithm of a false alarm's probability
_TAIL_OF_SHARDS = 40.0  # the same, where it is asked of every shard
_RELATIVE = 1e-3  # of a sum's norm: rounding of sums, and of the rows' own contributions, is far below


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What one release is to add, from the accounted numbers."""

    key: bytes
    release: int
    lattice: noise.Lattice
    noise_std: float
    divisor: float


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one shard's clipped sum: its elements at `_sites`, and its length."""

    at_sites: Tensor
    length: float


class ReleaseGuard:
    """Asks after `EARLY` releases, and every `EVERY`. `rows` counts the rows of a release that is to be looked at.

    Args:
        noise_multiplier: sigma, the one that is accounted.

    Attributes:
        asked_bound: R as the user asked for it, where bounds do not move by themselves.
    """

    def __init__(self, model: ShardedModel, privacy: PrivacyConfig, noise_multiplier: float) -> None:
        self._model, self._privacy, self._noise_multiplier = model, privacy, noise_multiplier
        self._drawn, self._bound = True, 0.0
        self.asked_bound = privacy.max_grad_norm
        self._releases, self._last, self._key = 0, 0, b""
        self.rows = torch.zeros((), dtype=torch.float64, device=model.device)

    @property
    def due(self) -> bool:
        return self._releases in EARLY or self._releases % EVERY == 0

    def restart(self, key: bytes, seeded: bool) -> None:
        """A new key for noise: the next release is looked at again."""
        if key == self._key and not seeded:
            refuse("the key for the noise is the last one again, so that noise would repeat")
        self._releases, self._key = 0, key

    def pass_first_release(self) -> None:
        """As if it had been looked at."""
        self._releases = 1

    def count(self, mask_B: Tensor, vouched: bool) -> None:
        """Rows of one microbatch that take part; `vouched` if they were drawn as the accountant assumes."""
        self._drawn &= vouched
        if self.due:
            self.rows += mask_B.sum()

    def before(self, bound: float) -> list[Seen]:
        """Look at the sums; what is to be given to `after`. `bound` is R as it is now, inf where nothing is promised."""
        self._bound = bound if math.isfinite(bound) else 0.0
        if not self.due:
            return []
        self.check_sum(bound)
        sums = [p.accumulator for p in self._model.parameters]
        at_sites, lengths = _fetched(sums), _lengths(sums)
        return [Seen(at_sites=x, length=length) for x, length in zip(at_sites, lengths, strict=True)]

    def after(self, segments: Sequence[Segment], sums: Sequence[Seen], mechanism: Mechanism) -> None:
        """Look at what is about to be published; and at the number of the release, each time.

        Raises:
            PrivacyError: on all ranks, since none may publish what another has found to be wrong.
        """
        if mechanism.release <= self._last:
            refuse(f"release {mechanism.release} was counted already, so that its noise would repeat")
        self._releases, self._last = self._releases + 1, mechanism.release
        if mechanism.noise_std < self._least_noise * (1 - 2.0**-40):
            refuse(f"release {mechanism.release} would have less noise than is accounted for")
        if not sums:
            return
        source = mechanism.noise_std == 0 or _is_normal(mechanism)
        parameters, outs = self._model.parameters, [s.out for s in segments]
        lengths, released = _lengths(outs), _fetched(outs)
        xi = _noise_at_sites(parameters, outs, mechanism)
        looked_at = zip(parameters, outs, sums, lengths, released, xi, strict=True)
        wrong = [
            p.name
            for p, out, seen, length, found_K, xi_K in looked_at
            if not _is_noised(found_K, out.dtype, seen.at_sites, xi_K, mechanism)
            or not _is_as_long(length, out, seen.length, mechanism)
        ]
        if self._model.any_rank(bool(wrong) or not source):
            where = f"in {', '.join(wrong[:3])}" if wrong else "by the source, or on another rank"
            refuse(f"the noise of release {mechanism.release} is not what is accounted for, {where}")

    @property
    def _least_noise(self) -> float:
        """The standard deviation that is accounted for: sigma R, with the R that was asked for unless bounds move."""
        bound = self.asked_bound if self._privacy.adaptive_bounds is None else self._bound
        return self._noise_multiplier * bound

    def _check_rows(self, rows: int) -> None:
        """Rows over all ranks: those of one draw."""
        privacy = self._privacy
        if not self._drawn or privacy.sampling == "external_poisson":
            return
        if privacy.sampling == "shuffle":
            wrong = rows != privacy.expected_batch_size
        else:
            cut = privacy.max_batch_size is not None
            wrong = is_unlikely(rows, privacy.dataset_size, privacy.sample_rate, at_most=cut)
        if wrong:
            refuse("the rows that all ranks have run are more or fewer than a draw has")

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

    def check_sum(self, bound: float) -> float:
        """How long the clipped sum is: not longer than `bound` for each of its rows, and never in a narrow format."""
        self._model.finish_accumulate()  # a release has; without one, sums may still be under way
        copies, model = self._check_tiling(), self._model
        square = torch.zeros((), dtype=torch.float64, device=model.device)
        for p in model.parameters:
            if p.accumulator.dtype.itemsize < 4:
                refuse(f"the clipped sum of '{p.name}' is {p.accumulator.dtype}, which rounds it by more than R allows")
            length = torch.linalg.vector_norm(p.accumulator, dtype=torch.float64)
            square += length.square().to(square.device) / copies[p.name]
        peers = 1 if model.split_group is None else dist.get_world_size(model.split_group)
        total = torch.stack([square, self.rows / peers])
        for group in model.groups:
            dist.all_reduce(total, group=group)
        self.rows.zero_()
        length, rows = math.sqrt(float(total[0])), float(total[1])
        self._check_rows(round(rows))
        if length > rows * bound * (1 + _RELATIVE):
            refuse(f"the clipped sum is longer than max_grad_norm={bound:g} for each of its rows")
        return length


def check_split(noise_multiplier: float, of_gradients: float, of_counts: float, groups: int) -> None:
    """Noise that gradients and counts of rows share costs no more than is accounted for (see `adaptive_bounds`).

    Raises:
        PrivacyError: it would cost more.
    """
    if noise_multiplier == 0:
        return
    cost = 1 / of_gradients**2 if of_gradients else math.inf
    if groups:
        cost += groups / (4 * of_counts**2) if of_counts else math.inf
    if cost > (1 + 1e-9) / noise_multiplier**2:
        refuse("the noise of the gradients, with that of the counts of adaptive bounds, is less than is accounted for")


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
    steps = min(numel, _INSIDE + 2)
    return torch.linspace(0, numel - 1, steps, dtype=torch.float64).long().unique().to(device)


def _is_normal(mechanism: Mechanism) -> bool:
    """Whether normals of the first parameter have the mean square of normals, up to a false alarm in 10^12.

    However few elements it has: the field goes on behind its end, and nobody else looks there.
    """
    square = float(_normals(mechanism, 0, 0, _NORMALS).square().sum())
    # The tails of a chi-square variable: Laurent and Massart (2000), lemma 1.
    slack = 2 * math.sqrt(_NORMALS * _TAIL)
    return _NORMALS - slack <= square <= _NORMALS + slack + 2 * _TAIL


def _noise_at_sites(
    parameters: Sequence[ManagedParameter], outs: Sequence[Tensor], mechanism: Mechanism
) -> Sequence[Tensor]:
    """Of every shard the normals of its `_sites`, float64 ``[K]``, put together at once."""
    counts, places = [], []
    for parameter, out in zip(parameters, outs, strict=True):
        sites = _sites(out.numel(), torch.device("cpu")).tolist()
        counts.append(len(sites))
        places += [(parameter.index, _place(parameter.region, i)) for i in sites]
    return noise.normals_at(mechanism.key, release=mechanism.release, places=places).split(counts)


def _fetched(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """What flat tensors of one device hold at their `_sites`, float64 ``[K]`` on the CPU, fetched at once."""
    at_sites = [x.view(-1)[_sites(x.numel(), x.device)].double() for x in tensors]
    return torch.cat(at_sites).cpu().split([x.numel() for x in at_sites]) if at_sites else []


def _is_noised(found_K: Tensor, dtype: torch.dtype, sum_K: Tensor, xi_K: Tensor, mechanism: Mechanism) -> bool:
    """Whether what was released is the sum and its own noise; equal but for the cast to ``dtype``."""
    if not found_K.numel():
        return True
    expected = mechanism.lattice.privatize(sum_K, xi_K, mechanism.noise_std) if mechanism.noise_std else sum_K
    expected = expected / mechanism.divisor
    cast = torch.finfo(dtype)  # below its smallest normal number, float16 rounds by more than eps
    slack = 2 * cast.eps * expected.abs() + cast.tiny + 2.0**-30 * mechanism.noise_std / mechanism.divisor
    return bool(((found_K - expected).abs() <= slack).all())


def _is_as_long(length: float, out: Tensor, sum_length: float, mechanism: Mechanism) -> bool:
    """Whether a shard is as long as the sum and noise on *every* element are together.

    |S + s xi|^2 = |S|^2 + 2 s <S, xi> + s^2 |xi|^2, of which the second is normal and the third chi-square (Laurent and
    Massart, as above); up to the cast to the parameter's dtype.
    """
    n, std, tail = out.numel(), mechanism.noise_std, _TAIL_OF_SHARDS
    mixed, spread = 2 * std * sum_length * math.sqrt(2 * tail), 2 * math.sqrt(n * tail)
    least = max(0.0, sum_length**2 - mixed + std**2 * (n - spread))
    most = sum_length**2 + mixed + std**2 * (n + spread + 2 * tail)
    cast = torch.finfo(out.dtype)
    slack = math.sqrt(n) * cast.tiny * mechanism.divisor
    rounding = max(2 * cast.eps, _RELATIVE)
    found = length * mechanism.divisor
    return math.sqrt(least) * (1 - rounding) - slack <= found <= math.sqrt(most) * (1 + rounding) + slack


def _lengths(tensors: Sequence[Tensor]) -> list[float]:
    """Norms of tensors on one device, in float64, fetched at once."""
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors]
    return torch.stack(norms).tolist() if norms else []


def _normals(mechanism: Mechanism, parameter: int, start: int, count: int) -> Tensor:
    return noise.standard_normal(
        mechanism.key, release=mechanism.release, parameter=parameter, start=start, count=count
    )


def _place(region: Region, i: int) -> int:
    """The element of the whole parameter that is the i-th of a shard."""
    if region.columns is None:
        return region.start + i
    width, offset, size = region.columns
    return region.start + i // size * width + offset + i % size
