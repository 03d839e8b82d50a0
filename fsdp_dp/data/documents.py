"""A document, and the division of documents into training and held-out text: by file, the same on every rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fsdp_dp.data.rows import held_out_names


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file: its name relative to the corpus, and its UTF-8 bytes."""

    name: str
    text: bytes


def is_utf8(text: bytes) -> bool:
    """Whether the bytes are UTF-8, which never contains 0xFF: the padding relies on that."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def split_documents(documents: Sequence[Document], held_out_fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, each in the given order, by `held_out_names`; no document is in both."""
    held_out = held_out_names([document.name for document in documents], held_out_fraction)
    return (
        [document for document in documents if document.name not in held_out],
        [document for document in documents if document.name in held_out],
    )


def unigram_bits(documents: Iterable[Sequence[int]]) -> float:
    """Entropy of the frequencies of bytes or tokens: what a model that knows only how common each is needs for one."""
    counts: Counter[int] = Counter()
    for text in documents:
        counts.update(text)
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())
