"""Gradients of rows that are kept rounded until their block's weights are known, on CPUs: the kernels are played by torch.

What a rounded gradient is, how it is measured and summed, is compared in tests/unit/test_instantiate_kernels.py; here, which
gradients are rounded, and that the clipped sum is as without, less what rounding may change.
"""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fsdp_dp import gradients, make_private, planner
from fsdp_dp.kernels import outer
from tests.distributed.harness import run
from tests.unit.toys import config, flat

ROWS, T, D, RANKS, MICROBATCHES, STEPS = 4, 5, 16, 2, 3, 2


class Block(nn.Module):
    """A layer that is called twice, and two that share their weight, beside layers that are called once."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.twice = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.Linear(D, D)
        self.one, self.other = nn.Linear(D, D), nn.Linear(D, D)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(self.twice(self.down(self.up(x).tanh())).sin())
        return x + self.other(self.one(h).tanh())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.last = nn.Linear(D, D), nn.ModuleList([Block(), Block()]), nn.Linear(D, D)
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x).sin()


rounded: list[tuple[int, ...]] = []


def stored_rows(a_BTD: Tensor, g_BTP: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert dtype == torch.bfloat16
    stored = (g_BTP.double().mT @ a_BTD.double()).to(dtype)
    rounded.append(tuple(stored.shape))
    return stored, stored.double().square().sum((1, 2))


def stored_norms(formed: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([torch.stack([squares, squares * 1e-6, squares * 1e-9]) for _, squares in formed])


def weighted_rows(
    stored: Tensor, weight: Tensor, out: Tensor | None = None, onto: Tensor | None = None, part: int = 0
) -> Tensor:
    total = torch.einsum("b,bpd->pd", weight.double(), stored.double()).float()
    if out is None:
        return total
    out.copy_(total.view(out.shape))
    if onto is not None:
        out[part] += onto
    return out


def weighted_outers(
    products: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    weight_KB: Tensor,
    owners: Sequence[int] | None = None,
    onto: Sequence[Tensor | None] | None = None,
    part: int = 0,
) -> list[Tensor]:
    found = []
    for number, (a, g, out) in enumerate(products):
        weight = weight_KB if owners is None else weight_KB[owners[number]]
        stored = g.double().mT @ a.double()
        found.append(weighted_rows(stored, weight, out, None if onto is None else onto[number], part))
    return found


class GhostNorms:
    def __init__(self, rows: int, device: torch.device) -> None:
        self._terms: list[Tensor] = []
        self.owners: list[int] = []

    def add(self, inputs: Sequence[tuple[Tensor, Sequence[Tensor]]], owners: Sequence[Sequence[int]]) -> None:
        self._terms += [gradients._gram_norms(a, g).stack() for a, gs in inputs for g in gs]
        self.owners += [owner for of_input in owners for owner in of_input]

    def terms(self) -> Tensor:
        return torch.stack(self._terms)


PLAYED: Mapping[str, object] = {
    "usable": lambda a, g: True,
    "forms_well": lambda a, g: True,
    "stored_rows": stored_rows,
    "stored_norms": stored_norms,
    "weighted_rows": weighted_rows,
    "weighted_outers": weighted_outers,
    "GhostNorms": GhostNorms,
}


def release(
    rank: int, world_size: int, clipping: str | dict[str, str], rounds: bool, compiled: bool = False
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """What a few releases moved the parameters by, and the gradients that were kept rounded in the last microbatch."""
    vars(outer).update(PLAYED)
    vars(planner)["method"] = lambda *_, rounds=False, **__: "round" if rounds and ROUNDS[0] else "gram"
    ROUNDS[0] = rounds
    model, rows = Model(), world_size * MICROBATCHES * ROWS
    for block in model.blocks:
        if compiled:
            block.compile(backend="aot_eager")
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    options = {"expected_batch_size": rows, "dataset_size": rows, "sampling": "external_poisson"}
    engine = make_private(model, config(max_grad_norm=0.5, clipping=clipping, **options), optimizer)
    made = torch.Generator().manual_seed(rank)
    released = []
    for _ in range(STEPS):
        for x in torch.randn(MICROBATCHES, ROWS, T, D, generator=made).bfloat16():
            rounded.clear()
            model(x).float().square().sum((1, 2)).mean().backward()
        engine.privatize()
        released.append(flat({n: p.grad.full_tensor() for n, p in model.named_parameters()}).double())  # type: ignore[union-attr,operator]
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(released), list(rounded)


ROUNDS = [False]
ONCE = [(ROWS, D, 2 * D), (ROWS, 2 * D, D)]  # of a block, in backward's order: down, up


@pytest.mark.parametrize("clipping", ["block", "layer"])
def test_as_without_rounding_but_for_what_that_changes(clipping: str) -> None:
    """Seen to fail where layers that are called twice, or that share a weight, are rounded use by use; where what stands in
    accumulators is added twice or not at all."""
    without, none = run(release, RANKS, clipping, False)[0]
    found, kept = run(release, RANKS, clipping, True)[0]
    assert none == [] and kept == ONCE * 2
    off = (found - without).norm(dim=1) / without.norm(dim=1)
    assert 0 < float(off.max()) < 2.0**-8


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the compiler's
def test_blocks_that_are_compiled() -> None:
    """Their layers are rounded as those of others."""
    without, none = run(release, RANKS, "layer", False, True)[0]
    found, kept = run(release, RANKS, "layer", True, True)[0]
    assert none == [] and sorted(kept) == sorted(ONCE * 2)
    off = (found - without).norm(dim=1) / without.norm(dim=1)
    assert 0 < float(off.max()) < 2.0**-8


@pytest.mark.parametrize("clipping", ["flat", {"*up*": "some", "*": "others"}], ids=["flat", "groups of all blocks"])
def test_what_waits_for_the_end_of_backward_is_not_rounded(clipping: str | dict[str, str]) -> None:
    """It would take more room than its factors, for as long. Seen to fail with groups of parameters of several units."""
    _, kept = run(release, RANKS, clipping, True)[0]
    assert kept == []
