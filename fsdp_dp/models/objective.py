"""The training objective as a pure function: one loss per row, of that row alone (the guarantee rests on it)."""

from __future__ import annotations

from torch import Tensor

from fsdp_dp.losses import per_sample_cross_entropy

IGNORED = -100


def row_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross entropy of each row, in nats per position: losses_B, fp32 or wider.

    A target of `IGNORED` (padding after a short row) counts zero and the divisor stays T, the same for every row.
    """
    return per_sample_cross_entropy(logits_BTV, targets_BT, ignore_index=IGNORED, divisor=targets_BT.shape[1])
