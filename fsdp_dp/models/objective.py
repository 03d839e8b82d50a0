"""The training objective as a pure function: one loss per row, of that row alone (the guarantee rests on it); and scores.

Legend: B rows, T positions, V vocabulary, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdp_dp.losses import per_sample_cross_entropy

IGNORED = -100


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each row, in nats per target: losses_B, fp32 or wider.

    Args:
        logits: [B, T, V] of a language model, or [B, K] of classes.
        targets: [B, T] or [B]. A target of `IGNORED` (padding after a short row) counts zero and the divisor stays T,
            the same for every row.
    """
    return per_sample_cross_entropy(logits, targets, ignore_index=IGNORED, divisor=math.prod(targets.shape[1:]))


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a model is, as a mean over targets.

    Attributes:
        name: as metrics are named.
        title: for people.
        baseline: what a model that knows nothing but frequencies goes by, in words.
        totals: from logits, targets, losses_B and the rows that count (bool [B]) to [sum, count], float64.
    """

    name: str
    title: str
    baseline: str
    totals: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bits(logits_BTV: Tensor, targets_BT: Tensor, losses_B: Tensor, counts_B: Tensor) -> Tensor:
    """Bits that it takes to tell the targets, and their number."""
    nats = losses_B.detach().double().where(counts_B, 0.0).sum() * targets_BT.shape[1]
    number = ((targets_BT != IGNORED) & counts_B[:, None]).sum()
    return torch.stack([nats / math.log(2), number.double()])


def hits(logits_BK: Tensor, targets_B: Tensor, losses_B: Tensor, counts_B: Tensor) -> Tensor:
    """Rows whose most likely class is the right one, and all rows."""
    right_B = (logits_BK.detach().argmax(-1) == targets_B) & counts_B
    return torch.stack([right_B.sum().double(), counts_B.sum().double()])


BITS_PER_BYTE = Score(name="bits_per_byte", title="bits per byte", baseline="byte frequencies alone", totals=bits)
BITS_PER_TOKEN = Score(name="bits_per_token", title="bits per token", baseline="token frequencies alone", totals=bits)
ACCURACY = Score(name="accuracy", title="accuracy", baseline="the commonest class", totals=hits)
SCORES = (BITS_PER_BYTE, BITS_PER_TOKEN, ACCURACY)
