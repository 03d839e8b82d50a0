"""Canaries: rows whose part in a training run can be looked for afterwards, for `fsdp_dp.audit`.

A *gradient canary* has a gradient of its own direction, as long as one likes: a table with one element for each canary
stands beside the decoder, and a canary's loss is its element, times a number (a Dirac canary). What a release holds at
that element is the canary's clipped contribution and noise, and nothing else. A *data canary* is a row of random bytes:
a row like others, and a weaker test.

Legend: B rows, T positions, m canaries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fsdp_dp.data.packing import split_row
from fsdp_dp.models.objective import IGNORED

Row = tuple[Tensor, Tensor, Tensor]


class WithCanaries(nn.Module):
    """A decoder and a table of canaries. Marker 0 is no canary, i is the i-th.

    Args:
        decoder: from tokens [B, T] to logits.
        canaries: m.
        norm: of a canary's gradient, before clipping.
    """

    def __init__(self, decoder: nn.Module, canaries: int, norm: float) -> None:
        super().__init__()
        self.decoder, self.norm = decoder, norm
        self.canary = nn.Embedding(canaries + 1, 1)

    @property
    def blocks(self) -> nn.Module:
        """FSDP's units."""
        return self.decoder.get_submodule("blocks")

    def forward(self, tokens_BT: Tensor, marker_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the loss of each row's canary."""
        value_B = self.canary(marker_B).squeeze(-1).float()
        return self.decoder(tokens_BT), torch.where(marker_B > 0, self.norm * value_B, 0.0)


class CanaryRows(Dataset[Row]):
    """m canaries and then ordinary rows, as (inputs_T, targets_T, marker). A canary that is left out has no gradient.

    The targets of gradient canaries, and of all that are left out, are `IGNORED`: a text without loss.
    """

    def __init__(self, rows: Tensor, included: Tensor, gradient: bool) -> None:
        self.rows, self.included, self.gradient = rows, included, gradient

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        inputs, targets = split_row(self.rows[index])
        marker = torch.zeros((), dtype=torch.long)
        if index < len(self.included):
            taking_part = bool(self.included[index])
            if self.gradient or not taking_part:
                targets = torch.full_like(targets, IGNORED)
            if self.gradient and taking_part:
                marker += index + 1
        return inputs, targets, marker
