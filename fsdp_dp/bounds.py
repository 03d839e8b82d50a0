"""Clipping bounds as they are now, with the noise that belongs to them: what one row may weigh, on which lattice."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fsdp_dp import noise
from fsdp_dp.adaptive_bounds import next_bounds, split_noise
from fsdp_dp.clipping import RowWeights
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.groups import Group
from fsdp_dp.guards import check_split
from fsdp_dp.numerics import un_noised_margin
from fsdp_dp.sharding.base import ShardedModel


class Bounds:
    """Fixed within a logical batch; with ``adaptive_bounds`` they move after a release (rule 13), else where they are `set`.

    Args:
        dtype: of the accumulators.
        noise_multiplier: sigma, the one that is accounted.

    Attributes:
        of_groups: R_k.
        max_grad_norm: R, of all together.
        for_a_row: R less what rounding may add.
        gradient_noise_multiplier: sigma_g, of the gradients' noise.
        lattice: on which noise is drawn.
    """

    def __init__(
        self,
        model: ShardedModel,
        groups: Sequence[Group],
        privacy: PrivacyConfig,
        noise_multiplier: float,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._privacy, self._dtype = model, privacy, dtype
        self._first = [group.bound for group in groups]
        self.gradient_noise_multiplier, self._count_noise = split_noise(
            noise_multiplier, len(groups), privacy.adaptive_bounds
        )
        counted = len(groups) if privacy.adaptive_bounds is not None else 0
        check_split(noise_multiplier, self.gradient_noise_multiplier, self._count_noise, counted)
        self._excess = torch.zeros(len(groups), dtype=torch.float64, device=model.device)
        self.set(self._first)

    def set(self, bounds: Sequence[float]) -> None:
        """Bounds of the groups for the logical batches from here on, and what follows from them."""
        # Up by a hair, since the R_k^2 of several groups add up to R^2 only up to rounding.
        max_grad_norm = float(bounds[0]) if len(bounds) == 1 else math.hypot(*bounds) * (1 + 2.0**-48)
        lattice = noise.Lattice.for_release(
            max_grad_norm=max_grad_norm,
            noise_multiplier=self.gradient_noise_multiplier,
            expected_batch_size=self._privacy.expected_batch_size,
        )
        # All of it together: a failure above, or in the next line, leaves what there was.
        self.for_a_row = self._sensitivity_left_for_a_row(max_grad_norm, lattice)
        self.of_groups, self.max_grad_norm, self.lattice = tuple(map(float, bounds)), max_grad_norm, lattice

    def scale(self, max_grad_norm: float) -> None:
        """`set` to the first bounds, times what makes them ``max_grad_norm`` together."""
        self.set([bound * (max_grad_norm / self._privacy.max_grad_norm) for bound in self._first])

    def of_row_in(self, group: int) -> float:
        """What a row's gradient may weigh in a group, as computed."""
        return self.of_groups[group] * (self.for_a_row / self.max_grad_norm)

    def count(self, groups: Sequence[int], rows: RowWeights, mask_B: Tensor, bounds: Sequence[float]) -> None:
        """Rows ``[K, B]`` of a finished microbatch within each group's bound, and beyond it: ±1/2 each, padding nothing."""
        if self._privacy.adaptive_bounds is not None:
            for number, (group, bound) in enumerate(zip(groups, bounds, strict=True)):
                within_B = rows.keep_B[number] & (rows.norm_B[number] <= bound)
                self._excess[group] += torch.where(mask_B, torch.where(within_B, 0.5, -0.5), 0.0).sum()

    def discard_counts(self) -> None:
        self._excess.zero_()

    def adapt(self, key: bytes, release: int) -> None:
        """Move by the noised shares of rows within the bounds: a part of the release that was just made."""
        options = self._privacy.adaptive_bounds
        if options is None:
            return
        excess = self._model.sum_over_data(self._excess).tolist()
        normals = noise.standard_normal(key, release=release, parameter=0, start=0, count=len(self._first))
        counts = [self._count_noise * x for x in normals.tolist()]
        self.agree_on(
            next_bounds(self.of_groups, self._first, excess, counts, self._privacy.expected_batch_size, options)
        )
        self._excess.zero_()

    def agree_on(self, bounds: Sequence[float]) -> None:
        """Rank 0's, to the last digit: noise is made for the bounds that every rank clips to."""
        form = f"<{len(self._first)}d"
        self.set(struct.unpack(form, self._model.agree(struct.pack(form, *bounds))))

    def saved(self, saved: Any, names: Sequence[str]) -> list[float]:
        """Where adaptive bounds of the groups ``names`` had come to; fixed ones are this model's, whatever trained before.

        Raises:
            PrivacyError: they are other groups' bounds, or no bounds.
        """
        if self._privacy.adaptive_bounds is None:
            return list(self.of_groups)
        if not isinstance(saved, Mapping) or set(saved) != set(names):
            found = sorted(map(str, saved))[:5] if isinstance(saved, Mapping) else repr(saved)
            raise PrivacyError(
                f"load_state_dict: the state has bounds of the clipping groups {found}, this model has "
                f"{sorted(names)[:5]}; load the state of a run of the same model, with the same parameters trainable, or "
                "start from the first bounds again: state['bounds'] = engine.state_dict()['bounds']"
            )
        for name, bound in saved.items():
            if type(bound) is not float or not 0 < bound < math.inf:
                raise PrivacyError(
                    f"load_state_dict: the bound of clipping group '{name}' is {bound!r}, and not a finite number above 0; "
                    "pass what engine.state_dict() returned"
                )
        return [saved[name] for name in names]

    def _sensitivity_left_for_a_row(self, max_grad_norm: float, lattice: noise.Lattice) -> float:
        """``max_grad_norm`` less what rounding of sums and the noise lattice may add (rules 2 to 4)."""
        bound = max_grad_norm
        if self._privacy.numerics == "certified":
            bound -= max_grad_norm * un_noised_margin(self._dtype, self._model.device)
        if self.gradient_noise_multiplier > 0:
            bound -= lattice.sensitivity_charge(self._model.global_numel)
        if bound <= 0:
            raise UnsupportedModelError(
                f"The noise lattice (spacing {lattice.spacing:.2e}) is too coarse for {self._model.global_numel} "
                "parameters at this expected_batch_size; lower expected_batch_size or noise_multiplier"
            )
        return bound
