#!/usr/bin/env python
"""Three attacks on the floating point of the usual DP-SGD, and the same on this library; docs/trust.md has the output.

    python scripts/demonstrate_attacks.py

1. A row that adds several times R: clip factors folded into bfloat16 output gradients.
2. A squared norm that comes out negative: the ghost norm in float32, of tokens that cancel.
3. Releases that only one of two neighbouring datasets can give: float32 noise added in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fsdp_dp import noise
from fsdp_dp.clipping import row_weights
from fsdp_dp.gradients import OuterProduct

DRAWS = 10**6


def cancelling_row() -> tuple[Tensor, Tensor]:
    """Inputs all 1, output gradients 510 x 1, 340 x -1.5, 1 x 1/2: of norm 1/2."""
    g = torch.cat([torch.ones(510), torch.full((340,), -1.5), torch.tensor([0.5])])
    return torch.ones(1, len(g), 1), g.view(1, -1, 1)


def clipped(a_BTD: Tensor, g_BTP: Tensor, bound: float) -> Tensor:
    """The contribution of one row as this library clips it."""
    gradient, everyone = OuterProduct(a_BTD, g_BTP), torch.ones(1, dtype=torch.bool)
    rows = row_weights(
        gradient.norm_terms(), everyone, bound=bound, loss_factor=1, numerics="certified", dtype=torch.float32
    )
    return gradient.weighted_sum(rows.weight_B, rows.keep_B)


def folded_clip_factors() -> tuple[float, float]:
    """The longest contribution in units of R, over many R: folded into bfloat16, and here."""
    a, g = cancelling_row()
    norm = float((g.double().mT @ a.double()).norm())
    folded = ours = 0.0
    for bound in torch.linspace(0.25, 0.5, 129).tolist():
        scaled = (g * (bound / norm)).bfloat16().double()
        folded = max(folded, float((scaled.mT @ a.double()).norm()) / bound)
        ours = max(ours, float(clipped(a, g, bound).double().norm()) / bound)
    return folded, ours


def negative_norms(rows: int = 200) -> tuple[float, float, float]:
    """The share of negative squared norms of float32 Grams; their contribution and ours at most, in units of R.

    As in attention keys, output gradients add up to zero over positions, and inputs have a large mean.
    """
    generator = torch.Generator().manual_seed(0)
    negative, ours, bound = 0, 0.0, 1e-3
    largest = 0.0
    for _ in range(rows):
        a = 1e3 + torch.randn(1, 32, 8, generator=generator)
        g = torch.randn(1, 32, 8, generator=generator)
        g = g - g.mean(1, keepdim=True)
        a = a.mean() + 1e-3 * (a - a.mean())  # nearly the same at all positions
        gram = float(((a @ a.mT) * (g @ g.mT)).sum())
        true = float((g.double().mT @ a.double()).norm())
        negative += gram < 0
        factor = min(1.0, bound / max(gram, 1e-30) ** 0.5)
        largest = max(largest, factor * true / bound)
        ours = max(ours, float(clipped(a, g, bound).double().norm()) / bound)
    return negative / rows, largest, ours


def impossible_outputs() -> tuple[float, float]:
    """Of releases of the sum 0, the share that the sum 1 cannot give (R = 1, sigma = 1): in float32, and here."""
    xi = torch.randn(DRAWS, generator=torch.Generator().manual_seed(0))
    needed = xi - 1
    reachable = torch.zeros(DRAWS, dtype=torch.bool)
    for direction in (None, -torch.inf, torch.inf):  # the float32 next to it might round to the release as well
        candidate = needed if direction is None else needed.nextafter(torch.tensor(direction))
        reachable |= candidate + 1 == xi
    lattice = noise.Lattice.for_release(max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=512)
    normals = noise.standard_normal(noise.key_from_seed(0), release=1, parameter=0, start=0, count=DRAWS)
    released = lattice.privatize(torch.zeros(DRAWS), normals, 1.0)
    units = (released - 1.0) / lattice.spacing  # the noise that the sum 1 would have needed
    return float((~reachable).double().mean()), float((units != units.round()).double().mean())


def main() -> None:
    folded, certified = folded_clip_factors()
    print(f"one row's contribution at most    folded into bfloat16: {folded:.2f} R    fsdp_dp: {certified:.2f} R")
    share, wrong, right = negative_norms()
    print(f"squared norms below zero          float32 Gram: {share:.0%} of cancelling rows    fsdp_dp: none")
    print(f"  contribution then, at most      float32 Gram: {wrong:.1f} R    fsdp_dp: {right:.2g} R")
    impossible, of_lattice = impossible_outputs()
    print(f"releases that show the sum         float32 noise: {impossible:.1%}    fsdp_dp: {of_lattice:.1%}")


if __name__ == "__main__":
    main()
