"""Documents to rows of equal length, and rows to (inputs, targets): a row is one sample.

Rows never overlap: a row holds `block_size + 1` bytes or tokens, from which it predicts the last `block_size`, so that none
is in two samples. Bytes are kept as uint8, tokens as int32.

Shapes: N rows, T = `block_size` positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fsdp_dp.data.documents import Document
from fsdp_dp.data.rows import Row, Rows
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


def pack_tokens(documents: Sequence[Sequence[int]], row_tokens: int) -> Tensor:
    """`pack`, of tokens: int32 rows [N, row_tokens]."""
    tokens = torch.tensor(list(itertools.chain.from_iterable(documents)), dtype=torch.int32)
    rows = len(tokens) // row_tokens
    return tokens[: rows * row_tokens].view(rows, row_tokens)


def tokens_one_per_document(documents: Sequence[Sequence[int]], row_tokens: int) -> Tensor:
    """`one_per_document`, of tokens, padded with `IGNORED`: int32 rows [N, row_tokens]."""
    rows = torch.full((len(documents), row_tokens), IGNORED, dtype=torch.int32)
    for row, document in zip(rows, documents, strict=True):
        start = torch.tensor(document[:row_tokens], dtype=torch.int32)
        row[: len(start)] = start
    return rows


class RowDataset(Rows):
    """Rows as (inputs_T, targets_T), both int64; padded targets are `IGNORED`."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return split_row(self.rows[index])

    def batch(self, indices: Tensor) -> Row:
        return split_row(self.rows[indices])


def split_row(rows: Tensor) -> Row:
    """[..., T + 1] -> (inputs, targets), int64 [..., T]: each position's byte or token, and the one that follows it.

    Padding is an input that any model can look up, and a target that does not count.
    """
    is_bytes, tokens = rows.dtype == torch.uint8, rows.long()
    padded = tokens == (PADDING if is_bytes else IGNORED)
    inputs = tokens if is_bytes else tokens.masked_fill(padded, 0)
    return inputs[..., :-1], tokens.masked_fill(padded, IGNORED)[..., 1:]
