"""Whole releases on two GPUs whose kernels keep rows' gradients rounded, NCCL, against the same releases without rounding.

tests/distributed/test_rounded_rows.py says which gradients are rounded; here they are really formed, measured and summed.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fsdp_dp import gradients, make_private, planner
from tests.distributed.harness import run
from tests.unit.toys import config, flat

pytestmark = pytest.mark.gpu(count=2)
ROWS, T, D, VOCABULARY, MICROBATCHES, STEPS, RANKS = 64, 512, 256, 1000, 3, 2, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(D), nn.Linear(D, 2 * D, bias=False), nn.Linear(2 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.blocks = nn.Embedding(VOCABULARY, D), nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(D, 8, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        x = self.table(index)
        for block in self.blocks:
            x = block(x)
        return self.last(x).sin()


def releases(rank: int, world_size: int, clipping: str, rounds: bool) -> tuple[Tensor, int]:
    """What some releases were, and how often a gradient was formed and rounded."""
    torch.cuda.set_device(rank)
    device, formed = torch.device("cuda", rank), [0]
    method, stored_rows = planner.method, gradients.fused.stored_rows

    def counted(a: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        formed[0] += dtype == torch.bfloat16
        return stored_rows(a, g, dtype)

    gradients.fused.stored_rows = counted
    if not rounds:
        vars(planner)["method"] = lambda *sizes, rounds=False, **options: method(*sizes, **options)
    model, rows = Model().to(device), world_size * MICROBATCHES * ROWS
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    options = {"expected_batch_size": rows, "dataset_size": rows, "sampling": "external_poisson"}
    engine = make_private(model, config(max_grad_norm=1.0, clipping=clipping, **options), optimizer)
    made = torch.Generator().manual_seed(rank)
    released = []
    for _ in range(STEPS):
        for index in torch.randint(VOCABULARY, (MICROBATCHES, ROWS, T), generator=made):
            model(index.to(device)).float().square().sum((1, 2)).mean().backward()
        engine.privatize()
        whole = {n: p.grad.full_tensor().cpu() for n, p in model.named_parameters()}  # type: ignore[union-attr,operator]
        released.append(flat(whole).double())
        optimizer.zero_grad()
    return torch.stack(released), formed[0]


@pytest.mark.parametrize("clipping", ["block", "layer"])
def test_releases_as_without_rounding(clipping: str) -> None:
    without, none = run(releases, RANKS, clipping, False, backend="cpu:gloo,cuda:nccl")[0]
    found, formed = run(releases, RANKS, clipping, True, backend="cpu:gloo,cuda:nccl")[0]
    assert none == 0 and formed >= 4 * MICROBATCHES * STEPS
    off = (found - without).norm(dim=1) / without.norm(dim=1)
    print(f"rounding moves a release by {off.tolist()} of itself")
    assert 0 < float(off.max()) < 2.0**-8
