"""A document, and the division of documents into training and held-out text: by file, the same on every rank."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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


def name_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, uniform over names."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_documents(documents: Sequence[Document], held_out_fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, each in the given order; no document is in both.

    A document is held out when the hash of its name falls below the fraction, so adding a file moves no other. Where
    that would leave a side empty, the one document whose hash is nearest to the fraction changes sides.

    Raises:
        ValueError: fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(
            f"data: found {len(documents)} document(s), expected at least 2, since text is held out by file; "
            "split the text into several files or widen data.path"
        )
    held_out = {document.name for document in documents if name_fraction(document.name) < held_out_fraction}
    if not held_out:
        held_out = {min((document.name for document in documents), key=name_fraction)}
    elif len(held_out) == len(documents):
        held_out.remove(max(held_out, key=name_fraction))
    return (
        [document for document in documents if document.name not in held_out],
        [document for document in documents if document.name in held_out],
    )


def unigram_bits_per_byte(texts: Iterable[bytes]) -> float:
    """Entropy of the bytes' frequencies: what a model that knows only how common each byte is needs per byte."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text)
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())
