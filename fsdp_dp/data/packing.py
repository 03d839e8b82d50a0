"""Documents to rows of equal length, and rows to (inputs, targets): a row is one sample.

Rows never overlap: a row holds `block_size + 1` bytes, from which it predicts the last `block_size`, so that no byte
is in two samples.

Shapes: N rows, T = `block_size` positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fsdp_dp.data.documents import Document
from fsdp_dp.models.objective import IGNORED

# No UTF-8 text contains this byte, so padding is never mistaken for text.
PADDING = 0xFF


def pack(documents: Sequence[Document], row_bytes: int) -> Tensor:
    """The documents joined and cut into uint8 rows [N, row_bytes]; the last, incomplete row is dropped.

    A row may hold the end of one document and the start of the next.
    """
    text = bytearray(b"".join(document.text for document in documents))
    rows = len(text) // row_bytes
    if rows == 0:
        return torch.empty(0, row_bytes, dtype=torch.uint8)
    return torch.frombuffer(text, dtype=torch.uint8)[: rows * row_bytes].view(rows, row_bytes)


def one_per_document(documents: Sequence[Document], row_bytes: int) -> Tensor:
    """The first `row_bytes` bytes of each document, padded: uint8 rows [N, row_bytes], one a document."""
    padding = bytes([PADDING])
    text = bytearray(b"".join(document.text[:row_bytes].ljust(row_bytes, padding) for document in documents))
    if not text:
        return torch.empty(0, row_bytes, dtype=torch.uint8)
    return torch.frombuffer(text, dtype=torch.uint8).view(len(documents), row_bytes)


class RowDataset(Dataset[tuple[Tensor, Tensor]]):
    """Rows as (inputs_T, targets_T), both int64; padded targets are `IGNORED`."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return split_row(self.rows[index])


def split_row(rows: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [..., T + 1] -> (inputs, targets), int64 [..., T]: each position's byte, and the byte that follows it."""
    tokens = rows.long()
    targets = tokens[..., 1:]
    return tokens[..., :-1], targets.masked_fill(targets == PADDING, IGNORED)
