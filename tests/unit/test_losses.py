"""Losses of rows, against torch on each row alone; and what a model's own loss must not do."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import PrivacyEngine, PrivacyError, UnsupportedModelError, make_private, per_sample_cross_entropy
from tests.unit.toys import config

IGNORED = 7


def problem(*middle: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, *middle, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(9, (4, *middle), generator=generator)
    return logits, torch.where(labels == IGNORED, 3, labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("middle", [(), (5,), (2, 3)])
def test_each_row_is_torchs_mean_over_that_row(middle: tuple[int, ...], smoothing: float) -> None:
    logits, labels = problem(*middle)
    if middle:
        labels.view(4, -1)[:2, 1:] = IGNORED
    found = per_sample_cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=smoothing)
    for of_row, row, of in zip(found, logits, labels, strict=True):
        alone = F.cross_entropy(row.reshape(-1, 9), of.reshape(-1), ignore_index=IGNORED, label_smoothing=smoothing)
        torch.testing.assert_close(of_row, alone)


def test_row_without_labels_is_zero_and_has_no_gradient() -> None:
    logits, labels = problem(5)
    labels[1] = -100
    logits.requires_grad_()
    losses = per_sample_cross_entropy(logits, labels)
    losses.sum().backward()
    assert losses[1] == 0
    assert not logits.grad[1].any()
    assert logits.grad[0].any()


def test_divisor_is_one_for_all_rows() -> None:
    logits, labels = problem(5)
    labels[0, 2:] = -100
    by_position = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(per_sample_cross_entropy(logits, labels, divisor=10), by_position.sum(1) / 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    logits, labels = problem(5)
    found = per_sample_cross_entropy(logits.to(dtype), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, per_sample_cross_entropy(logits.to(dtype).float(), labels))


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), ()])
def test_classes_must_come_last(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected logits \[B, ..., V\] with classes last"):
        per_sample_cross_entropy(torch.zeros(4, 9, 5), torch.zeros(shape, dtype=torch.long))


# ----------------------------------------------------------------------------------------- losses that models compute


class LossInside(nn.Module):
    """As Hugging Face's models: a mean over labels, or their sum divided by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 9)

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        logits = self.lin(x)
        kind = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=kind)
        return {"loss": loss if num_items_in_batch is None else loss / num_items_in_batch, "logits": logits}


def inside(**changes: Any) -> tuple[nn.Module, PrivacyEngine]:
    torch.manual_seed(0)
    model = LossInside().double()
    return model, make_private(model, config(**{"sampling": "external_poisson"} | changes))


def labelled(positions: int = 5) -> tuple[Tensor, Tensor]:
    return torch.ones(4, positions, 3, dtype=torch.float64), torch.arange(4 * positions).view(4, -1) % 9


def test_mean_over_labels_is_refused_though_all_rows_have_as_many_now() -> None:
    model, engine = inside()
    with pytest.raises(UnsupportedModelError, match=r"mean over all labels of the batch.*per_sample_cross_entropy"):
        model(*labelled())["loss"].backward()
    with pytest.raises(PrivacyError, match="Nothing was released"):
        engine.privatize()


def test_mean_over_labels_that_the_program_does_not_use_is_fine() -> None:
    model, engine = inside()
    x, labels = labelled()
    per_sample_cross_entropy(model(x, labels)["logits"], labels).mean().backward()
    engine.privatize()


def test_mean_over_one_label_a_row_is_fine() -> None:
    model, engine = inside()
    model(*labelled(1))["loss"].backward()
    engine.privatize()


def test_constant_divisor_is_fine() -> None:
    model, engine = inside(loss_reduction="sum")
    for _ in range(2):
        model(*labelled(), num_items_in_batch=11)["loss"].backward()
    engine.privatize()


@pytest.mark.parametrize("counted", [[torch.tensor(20)], [20, 17], [20, None], [None, 20]])
def test_counted_divisor_is_refused(counted: list[Any]) -> None:
    model, engine = inside(loss_reduction="sum")
    *before, last = counted
    for items in before:
        per_sample_cross_entropy(model(*labelled(), num_items_in_batch=items)["logits"], labelled()[1]).sum().backward()
    with pytest.raises(PrivacyError, match=r"num_items_in_batch=.*counted from the batch divides the loss"):
        model(*labelled(), num_items_in_batch=last)
    if before:
        with pytest.raises(PrivacyError, match="Nothing was released"):
            engine.privatize()
