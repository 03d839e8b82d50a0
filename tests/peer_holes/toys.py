"""Small subjects for the holes, and how to ask what was said when one is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_dp import PrivacyEngine
from tests.agreement import Batch, Subject, config, on_one_device, row_gradients
from tests.oracle import norm

ROWS = 5
EXACT = 1e-9


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(positions: int = 4, vocabulary: int = 11) -> Tensor:
    return torch.randint(vocabulary, (ROWS, positions), generator=torch.Generator().manual_seed(2))


def square_losses(outputs: Tensor, batch: Batch) -> Tensor:
    """A loss of each row; rows differ in weight, so that their gradients differ in length."""
    return batch["weight"] * (outputs - 1).square().flatten(1).mean(1)


def subject(
    build: Callable[[], nn.Module], losses: Callable[[Any, Batch], Tensor] = square_losses, **batch: Any
) -> Subject:
    """A model built with a fixed seed, in float64, and a batch of these arguments."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return build().double()

    weight = torch.linspace(0.2, 3, ROWS, dtype=torch.float64)
    return Subject(model=model, batch=lambda: {**batch, "weight": weight}, losses=losses, targets=("weight",))


def attached(model: nn.Module, **changes: Any) -> tuple[nn.Module, PrivacyEngine]:
    return on_one_device(model, config(**({"max_grad_norm": 1.0} | changes)))


def padding_released(model: nn.Module, engine: PrivacyEngine, x: Tensor) -> dict[str, Tensor]:
    """A release of no row, so of noise alone, as its sum; it is then dropped."""
    with engine.microbatch(torch.zeros(len(x), dtype=torch.bool)):
        model(x).float().mean().backward()
    engine.privatize()
    grads = {n: p.grad.double() * engine.privacy.expected_batch_size for n, p in model.named_parameters()}
    engine.discard()
    return grads


def std(grads: dict[str, Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in grads.values()]).std())


def assert_norms(found: Tensor, of: Subject, model: nn.Module) -> None:
    """The engine's norms are those of the rows' gradients, in plain autograd on `model`."""
    expected = [norm(gradient) for gradient in row_gradients(of, model, of.batch())]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=EXACT, atol=0)
