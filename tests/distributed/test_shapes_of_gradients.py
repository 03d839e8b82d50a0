"""Gradients that have not their parameter's shape: laid out as that where they have as many elements, else refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from fsdp_dp import UnsupportedModelError, make_private
from fsdp_dp.gradients import Materialized, PerSampleGradient
from fsdp_dp.layers import layer_rule
from tests.distributed.harness import RankFailure, run
from tests.unit.toys import clipped_sum, config, flat, row_gradients

ROWS, D, RANKS = 4, 6, 2


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, torch.Size(shape).numel()).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def scale(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """As of a vector, whatever the shape is."""
    return {"scale": Materialized((a * g).sum(1))}


class Model(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.scale, self.last = nn.Linear(D, D), Scale(*shape), nn.Linear(D, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scale(self.first(x.to(self.first.weight.dtype)).double()).sin()).cos()


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum((1, 2)).mean()


def rows(rank: int) -> Tensor:
    return torch.randn(ROWS, 2, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def released(rank: int, world_size: int, kind: str, shape: tuple[int, ...]) -> Tensor:
    """What one step moved the parameters by, times all rows."""
    layer_rule(Scale, parameters=("scale",))(scale)  # in this process alone
    count, options = world_size * ROWS, {"max_grad_norm": 0.5, "sampling": "external_poisson"}
    model: nn.Module = Model(*shape)
    if kind == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    elif "fsdp2" in kind:
        model.first.to(torch.float32 if "float32" in kind else torch.float64)  # type: ignore[operator]
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    make_private(model, config(expected_batch_size=count, dataset_size=count, **options), optimizer)
    before = whole(model)
    row_loss(model, rows(rank)).backward()
    optimizer.step()
    return (before - whole(model)) * count


def whole(model: nn.Module) -> Tensor:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return flat({n: p.detach().clone() for n, p in model.named_parameters()})
    return flat({n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}).detach()


@pytest.mark.parametrize("kind", ["whole", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("shape", [(2, D), (1,)])
def test_another_size_is_refused(kind: str, shape: tuple[int, ...]) -> None:
    """Seen to fail under FSDP2, which released what was in its bucket's memory; elsewhere with an error of torch's."""
    with pytest.raises((RankFailure, UnsupportedModelError), match="found a gradient of shape"):
        if kind == "whole":
            released(0, 1, kind, shape)
        run(released, RANKS, kind, shape)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_as_many_elements_are_laid_out_as_the_parameter(kind: str) -> None:
    """Seen to fail under FSDP2: a vector was cut into as many parts as a matrix of one row is not."""
    of_rows = row_gradients(Model(1, D), row_loss, torch.cat([rows(rank) for rank in range(RANKS)]))
    for found in run(released, RANKS, kind, (1, D)):
        torch.testing.assert_close(found, clipped_sum(of_rows, 0.5), rtol=1e-9, atol=1e-11)


def test_layers_of_one_unit_in_two_formats() -> None:
    """Seen to fail: gradients in two formats are not laid out together."""
    of_rows = row_gradients(Model(D), row_loss, torch.cat([rows(rank) for rank in range(RANKS)]))
    for found in run(released, RANKS, "fsdp2 with a layer in float32", (D,)):
        torch.testing.assert_close(found, clipped_sum(of_rows, 0.5), rtol=1e-4, atol=1e-5)
