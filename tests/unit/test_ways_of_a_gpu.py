"""Whole steps of an engine that takes the ways of a GPU, on CPU tensors with kernels in Triton's interpreter, against a loop.

Norms are the nominal ones, so that what is summed differs from the float64 loop by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fsdp_dp import kernels
from fsdp_dp.kernels import outer
from tests.unit.interpreted import interpreter
from tests.unit.toys import clipped_sum, flat, moved, private, row_gradients, values

ROWS, T, D = 4, 3, 8


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with interpreter():
        import fsdp_dp.kernels.position_sums_triton
        import fsdp_dp.kernels.row_weights
        import fsdp_dp.kernels.vectors_triton  # noqa: F401

        monkeypatch.setattr(kernels, "available", lambda device: True)
        monkeypatch.setattr(outer, "_runs_on", lambda device: True)
        yield


class Shifted(nn.Module):
    """One vector alone, whose gradient is what backward expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.shift = nn.Linear(D, D, bias=False), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, 0]) + self.shift


class Block(nn.Module):
    """More biases and norm layers than a launch is told of, some of them used twice, or of rows without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(D), nn.RMSNorm(D), nn.LayerNorm(D), nn.RMSNorm(D, eps=0.1)])
        self.ups, self.downs = (nn.ModuleList(nn.Linear(*sizes) for _ in range(4)) for sizes in ((D, 11), (11, D)))
        self.group = nn.GroupNorm(1, D)

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(up(norm(x)).sin())
        return self.norms[0](x) + self.group(self.norms[1](x.sum(1)))[:, None]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one vector": Shifted,
    "block": Block,
    "blocks": lambda: nn.Sequential(Block(), Block()),
}


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).sum(1).mul(3).mean()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", MODELS)
def test_as_a_loop_over_rows(name: str) -> None:
    """Three microbatches of two shapes. Seen to fail (one vector) where a kernel is given what backward expanded."""
    torch.manual_seed(0)
    model = MODELS[name]()
    made = torch.Generator().manual_seed(1)
    batches = [torch.randn(ROWS, positions, D, generator=made) for positions in (T, T, T + 2)]
    count = ROWS * len(batches)
    expected = sum(clipped_sum(row_gradients(model, row_loss, x), 1.0) for x in batches) / count
    rows = {"expected_batch_size": count, "dataset_size": count}
    subject, before = private(model, sampling="external_poisson", numerics="nominal", **rows), values(model)
    for x in batches:
        row_loss(model, x).backward()
    subject.optimizer.step()
    found = flat(moved(model, before))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
