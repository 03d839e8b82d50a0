"""Rows as the application reads them: map-style, each (inputs, targets), and one sample; and which of them are held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

Row = tuple[Tensor, Tensor]


class Rows(Dataset[Row]):
    """A map-style data set; `__len__` and `__getitem__` are the subclass's."""

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: Tensor) -> Row:
        """Rows by number, the batch in front."""
        batch: Row = tuple(default_collate([self[i] for i in indices.tolist()]))  # type: ignore[assignment]
        return batch


class LabelledRows(Rows):
    """Inputs with one label each.

    Args:
        inputs: by number: a tensor, or anything that `read` makes one of.
        labels: class numbers, one an input.
        numbers: which of them are rows; default all.
        read: from an input to the tensor that the model takes.
    """

    def __init__(
        self, inputs: Any, labels: Sequence[int], numbers: Sequence[int], read: Callable[[Any], Tensor] = lambda x: x
    ) -> None:
        self.inputs, self.labels, self.numbers, self.read = inputs, labels, numbers, read

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Row:
        number = self.numbers[index]
        return self.read(self.inputs[number]), torch.tensor(int(self.labels[number]))

    def count_labels(self) -> Counter[int]:
        return Counter(int(self.labels[number]) for number in self.numbers)


def name_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, uniform over names."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def fingerprint(content: bytes) -> str:
    """A name for a row that has none: what is equal is on the same side, and adding a row moves no other."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def held_out_names(names: Sequence[str], fraction: float) -> set[str]:
    """Those whose hash falls below the fraction. Where that would leave a side empty, the one whose hash is nearest to the
    fraction changes sides.

    Raises:
        ValueError: all names are the same, or there are fewer than two.
    """
    if len(set(names)) < 2:
        raise ValueError(
            f"data: found {len(set(names))} document(s), expected at least 2 different ones, since a part is held out; "
            "split the text into several files, widen data.path, or give data.held_out_split"
        )
    held_out = {name for name in names if name_fraction(name) < fraction}
    if not held_out:
        held_out = {min(names, key=name_fraction)}
    elif len(held_out) == len(set(names)):
        held_out.remove(max(held_out, key=name_fraction))
    return held_out
