"""Compiled kernels over vectors, side by side, against float64: twice, with other values."""

import pytest
import torch

from fsdp_dp.gradients import Materialized
from fsdp_dp.kernels import vectors
from fsdp_dp.together import NormTally, weighted_sums

pytestmark = pytest.mark.gpu(count=1)
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("rows", [1, 20])
def test_norms_and_sums_of_the_vectors_of_several_groups(rows: int) -> None:
    owners = [1, 0, 1, 2, 0]
    for seed in range(2):
        torch.manual_seed(seed)
        named = {
            str(n): Materialized(torch.randn(rows, w, device=DEVICE)) for n, w in enumerate([5120, 1, 33, 1280, 2])
        }
        assert all(vectors.usable(x.value) for x in named.values())
        tally = NormTally(rows, DEVICE)
        tally.add(list(named.values()), owners)
        terms = tally.measured(3).of_groups()
        weight = torch.rand(3, rows, device=DEVICE)
        weight[1, 0] = 0.0
        sums = weighted_sums(named, weight, weight > 0, owners=dict(zip(named, owners, strict=True)))
        for group in range(3):
            own = [name for name, owner in zip(named, owners, strict=True) if owner == group]
            exact = sum(named[name].value.double().square().sum(1) for name in own)
            assert ((terms.norm_sq[group] - exact).abs() <= terms.error[group]).all()
            for name in own:
                expected = weight[group].double() @ named[name].value.double()
                torch.testing.assert_close(sums[name].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 2])
def test_sums_in_their_places_in_a_bucket(shards: int) -> None:
    widths = [1280, 2, 640]
    for seed in range(2):
        torch.manual_seed(seed)
        memory = torch.randn(5, sum(widths), device=DEVICE)
        named = {str(n): Materialized(x) for n, x in enumerate(memory.split(widths, 1))}
        bucket = torch.full((shards, 3 + sum(widths) // shards), torch.nan, device=DEVICE)
        into = dict(zip(named, bucket[:, 3:].split([w // shards for w in widths], 1), strict=True))
        weight = torch.rand(5, device=DEVICE)
        sums = weighted_sums(named, weight, weight > 0, into)
        assert bucket[:, :3].isnan().all()
        for name, x in named.items():
            assert sums[name] is into[name]
            expected = weight.double() @ x.value.double()
            torch.testing.assert_close(sums[name].flatten().double(), expected, rtol=1e-5, atol=1e-5)
