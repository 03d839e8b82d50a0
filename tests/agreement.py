"""Does a private update of this model agree with a float64 loop over its rows? For any model called by keyword.

A `Subject` is a model, a batch of keyword arguments and the loss of each row. The loop (`expected_update`) runs a forward
and a backward of every row alone, in plain autograd on a float64 copy, clips, adds, and knows nothing of the engine; it
has Hugging Face models, adapters and one-layer toys in it alike, since a batch is sliced wherever it has rows.

Legend: N rows of a batch, B rows of a microbatch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_dp import PrivacyConfig, PrivacyEngine, make_private
from tests.oracle import Gradients, clipped_sum, norm, relative_error, share, trainable

Batch = dict[str, Any]
Attach = Callable[[nn.Module, PrivacyConfig], tuple[nn.Module, PrivacyEngine]]
EXPECTED_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in its initial state (the same at every call), N rows, and their losses.

    `losses(outputs, batch)` is ``[B]``, or the scalar that the model itself computed (`loss_reduction` says whether it is
    a mean or a sum over rows). Arguments named in `targets` are for the loss, and not for the model.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    losses: Callable[[Any, Batch], Tensor]
    targets: tuple[str, ...] = ("labels",)
    loss_reduction: str = "mean"
    tolerance: float = 1e-9


def row_count(batch: Batch) -> int:
    return max(len(x) for x in batch.values() if isinstance(x, Tensor) and x.ndim)


def rows_of(batch: Batch, numbers: Tensor) -> Batch:
    """Some rows of a batch. What has no rows (positions ``[1, T]``, numbers) stays as it is."""
    rows = row_count(batch)
    return {name: x[numbers] if isinstance(x, Tensor) and x.ndim and len(x) == rows else x for name, x in batch.items()}


def loss_of(subject: Subject, model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a microbatch as a program writes it."""
    arguments = {name: x for name, x in batch.items() if name not in subject.targets}
    losses = subject.losses(model(**arguments), batch)
    return losses.mean() if subject.loss_reduction == "mean" else losses.sum()


def row_gradients(subject: Subject, model: nn.Module, batch: Batch) -> Iterator[Gradients]:
    """The gradient of every row's loss, float64, each from a forward of that row alone."""
    parameters = trainable(model)
    for i in range(row_count(batch)):
        loss = loss_of(subject, model, rows_of(batch, torch.tensor([i])))
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        yield {
            name: torch.zeros_like(p, dtype=torch.float64) if g is None else g.double()
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }


def expected_update(subject: Subject, bound: float | None = None) -> tuple[Gradients, float]:
    """The clipped sum over all rows, and the bound that it was clipped to: by default the median norm."""
    model, batch = subject.model().double(), subject.batch()
    gradients = list(row_gradients(subject, model, batch))
    if bound is None:
        bound = float(torch.tensor([norm(g) for g in gradients], dtype=torch.float64).median())
    assert bound > 0, "half of the rows have no gradient"
    return clipped_sum(iter(gradients), bound), bound


def config(**changes: Any) -> PrivacyConfig:
    """No noise, and sampling that the test vouches for."""
    defaults: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "expected_batch_size": EXPECTED_BATCH_SIZE,
        "dataset_size": 1000,
        "target_delta": 1e-5,
        "sampling": "external_poisson",
    }
    return PrivacyConfig(**(defaults | changes))


def on_one_device(model: nn.Module, privacy: PrivacyConfig) -> tuple[nn.Module, PrivacyEngine]:
    return model, make_private(model, privacy)


def local_parameters(model: nn.Module) -> Gradients:
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def private_update(
    subject: Subject,
    bound: float,
    *,
    attach: Attach = on_one_device,
    parameters: Callable[[nn.Module], Mapping[str, Tensor]] = local_parameters,
    microbatch: int = 2,
    empty_last: bool = False,
) -> Gradients:
    """What one private release adds up to, as the optimizer saw it, times the expected batch size."""
    privacy = config(max_grad_norm=bound, loss_reduction=subject.loss_reduction)
    model, engine = attach(subject.model(), privacy)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    before, batch = parameters(model), subject.batch()
    split = {"rank": engine.model.data_rank, "size": engine.model.data_size}
    for numbers, mask in share(range(row_count(batch)), **split, microbatch=microbatch, empty_last=empty_last):
        with engine.microbatch(mask):
            loss_of(subject, model, rows_of(batch, numbers)).backward()
    optimizer.step()
    optimizer.zero_grad()
    engine.detach()
    return {name: (before[name] - p) * EXPECTED_BATCH_SIZE for name, p in parameters(model).items()}


def error(subject: Subject, **options: Any) -> float:
    """How far a private update on one device is from the loop over rows, relative, for the worst parameter."""
    expected, bound = expected_update(subject)
    return relative_error(private_update(subject, bound, **options), expected)


def assert_exact(subject: Subject, **options: Any) -> None:
    found = error(subject, **options)
    assert found <= subject.tolerance, f"relative error {found:.1e}"
