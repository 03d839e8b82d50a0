"""The training objective as a pure function: one loss per row, of that row alone (the guarantee rests on it)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def row_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross entropy of each row, in nats per position: losses_B, fp32 or wider.

    A target of `IGNORED` (padding after a short row) counts zero and the divisor stays T, the same for every row: with
    the number of counted positions of the *batch* as divisor, one row would change the gradient of the others.
    """
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none", ignore_index=IGNORED)
    return losses_BT.mean(dim=1)
