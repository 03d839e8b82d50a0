"""What a step tells of un-noised data is what plain arithmetic makes of its rows, padding left out."""

import time

import pytest
import torch
from torch import nn

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.models.objective import ACCURACY, row_losses
from fsdp_dp.training.diagnostics import Step
from fsdp_dp.training.schema import TrainConfig
from fsdp_dp.training.world import start_world
from tests.oracle import norm, row_gradients

BOUND = 0.8
MASKS = ([True, True, True, True], [True, True, False, False])


def test_norms_score_and_padding_of_two_microbatches() -> None:
    """Seen to fail when the norms of padding rows are counted."""
    torch.manual_seed(0)
    model, rows, labels = nn.Linear(3, 2).double(), torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    real = torch.tensor([*MASKS[0], *MASKS[1]])
    norms = torch.tensor([norm(g) for g in row_gradients(model, (rows, labels), row_losses)], dtype=torch.float64)[real]
    privacy = PrivacyConfig(
        max_grad_norm=BOUND, noise_multiplier=0.0, expected_batch_size=8, dataset_size=100, target_delta=1e-5,
        sampling="external_poisson",
    )  # fmt: skip
    right = (model(rows).argmax(1) == labels)[real].double().mean().item()
    engine = make_private(model, privacy)
    with start_world(TrainConfig(device="cpu")) as world:
        step, started = Step(world, engine), time.perf_counter()
        for part, mask in zip((slice(0, 4), slice(4, 8)), MASKS, strict=True):
            with engine.microbatch(torch.tensor(mask)):
                logits = model(rows[part])
                losses_B = row_losses(logits, labels[part])
                losses_B.mean().backward()
            mask_B = torch.tensor(mask)
            step.count(ACCURACY.totals(logits, labels[part], losses_B, mask_B), mask_B)
        found, stopping = step.gather(started, stopping=True)
    assert stopping
    assert found["score"] == pytest.approx(right) and found["useful_rows"] == 6 / 8
    assert found["clipped"] == (norms > BOUND).double().mean().item() and 0 < found["clipped"] < 1
    for name, level in (("norm_10", 0.1), ("norm_50", 0.5), ("norm_90", 0.9)):
        assert found[name] == pytest.approx(norms.quantile(level).item() / BOUND, rel=1e-4)
    assert found["rows_per_second"] > 0 and 0.01 < found["memory_gib"] < 100
