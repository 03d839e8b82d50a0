"""Losses that are sums over rows, each row's term a function of that row alone (rule 8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def per_sample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    divisor: float | None = None,
) -> Tensor:
    """Cross entropy of every row, in nats per label: ``[B]``, float32 or wider.

    A row's labels are averaged over the row itself; the mean over all labels of the *batch* would let one row change the
    gradients of others. Take ``.mean()`` of the result, or ``.sum()`` with ``loss_reduction="sum"``.

    Args:
        logits: ``[B, ..., V]``, classes last. For next-token prediction, ``logits[:, :-1]``.
        labels: ``[B, ...]`` integers. For next-token prediction, ``labels[:, 1:]``.
        ignore_index: labels that count zero. A row that has no others has loss zero.
        label_smoothing: as of `torch.nn.functional.cross_entropy`.
        divisor: one number for all rows, in place of each row's own number of counted labels.
    """
    if logits.shape[:-1] != labels.shape or labels.ndim == 0:
        raise ValueError(
            f"per_sample_cross_entropy: logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected "
            "logits [B, ..., V] with classes last, and labels [B, ...]"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        wide.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    sums_B = losses.view(len(labels), -1).sum(1)
    if divisor is not None:
        return sums_B / divisor
    return sums_B / (labels != ignore_index).reshape(len(labels), -1).sum(1).clamp(min=1)
