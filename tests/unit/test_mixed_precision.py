"""bfloat16 and float16, as parameters and under autocast, without loss scaling (DP-ZeRO, arXiv 2311.11822).

Clipping brings every row's gradient to its own scale, so a scale of the loss buys nothing, and in float16 it overflows.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import make_private
from tests.distributed.backends import (
    EXPECTED_BATCH_SIZE,
    all_at_once,
    excesses,
    fail_if_any,
    inaccuracies,
    one_by_one,
    privacy_config,
)
from tests.oracle import CASES, clipped_sum, norm, row_gradients, token_losses, trainable

BOUND = 0.7
GRAD_SCALERS_FIRST_SCALE = 2.0**16


@pytest.mark.parametrize("rows", ["decoder", "norms", "cancelling wide"])
def test_float16_parameters_are_close_and_within_the_bound(rows: str) -> None:
    """Rows one by one hold the bound (the release is cast to float16 after it); together they are near the oracle's sum."""
    alone = one_by_one(rows, "plain", BOUND, dtype=torch.float16)
    fail_if_any(excesses({alone: alone.run()}, cast=2.0**-10))
    if rows in CASES:
        together = all_at_once(rows, "plain", BOUND, dtype=torch.float16)
        fail_if_any(inaccuracies({together: together.run()}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["decoder", "tied checkpointed", "bare parameters", "shared weights"])
def test_autocast_is_close_to_the_oracle(case: str, dtype: torch.dtype) -> None:
    chosen = CASES[case]
    inputs, targets = chosen.batch()
    expected = clipped_sum(row_gradients(chosen.model(), (inputs, targets), token_losses), BOUND)
    model = chosen.model(torch.float32)
    engine = make_private(model, privacy_config(max_grad_norm=BOUND, loss_reduction="sum"))
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(inputs)
    token_losses(outputs, targets).sum().backward()
    engine.privatize()
    released = {name: p.grad.double() * EXPECTED_BATCH_SIZE for name, p in trainable(model).items()}
    error = norm({name: released[name] - e for name, e in expected.items()}) / norm(expected)
    assert error <= (3e-2 if dtype == torch.bfloat16 else 4e-3)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = 32
        hidden = [nn.Linear(width, width) for _ in range(3)]
        for layer in hidden:  # of a gain at which gradients grow on their way back
            nn.init.orthogonal_(layer.weight, 1.6)
        self.layers = nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in hidden), nn.Linear(width, 4))
        nn.init.orthogonal_(self.layers[-1].weight, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def rows() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    return x.half(), x[:, :4].argmax(1)


def loss(model: nn.Module) -> Tensor:
    x, y = rows()
    return F.cross_entropy(model(x).float(), y, reduction="sum")


def trained(scale: float, steps: int = 40) -> tuple[float, int]:
    """The loss after private training in float16 with the loss scaled, and how many rows overflowed on the way."""
    model = Classifier().half()
    engine = make_private(model, privacy_config(max_grad_norm=1.0, loss_reduction="sum", expected_batch_size=64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(steps):
        (loss(model) * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(loss(model)) / 64, int(engine.nonfinite_rows)


def test_float16_trains_without_loss_scaling_and_overflows_with_it() -> None:
    plain = Classifier().half()
    (loss(plain) * GRAD_SCALERS_FIRST_SCALE).backward()
    assert any(not p.grad.isfinite().all() for p in plain.parameters())

    at_first = float(loss(plain).detach()) / 64
    without, dropped = trained(scale=1.0)
    assert dropped == 0 and without < 0.6 * at_first
    _, overflowed = trained(scale=GRAD_SCALERS_FIRST_SCALE, steps=1)
    assert overflowed > 32, "these rows contribute nothing: they are not finite"


def test_a_scale_that_does_not_overflow_changes_nothing() -> None:
    """Beyond its bound, a row is clipped to it at any scale."""
    released = []
    for scale in (1.0, 8.0):
        model = Classifier()
        engine = make_private(model, privacy_config(max_grad_norm=1e-3, loss_reduction="sum"))
        (F.cross_entropy(model(rows()[0].float()), rows()[1], reduction="sum") * scale).backward()
        engine.privatize()
        released.append({name: p.grad for name, p in trainable(model).items()})
    assert norm({n: released[0][n] - g for n, g in released[1].items()}) <= 1e-5 * norm(released[1])
