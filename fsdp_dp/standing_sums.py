"""What a unit's accumulators hold already, where a kernel adds it to the sum that it writes into the unit's bucket.

A reduce-scatter then gives the accumulators' new values, in their place. Without that, its result is added in a pass of its
own, which reads 8 bytes an element and writes 4; the kernel reads 4.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Standing:
    """Of one sum of one unit.

    Attributes:
        part: which slice of a place in the bucket is this rank's.
        added: the names of those that kernels add.
    """

    def __init__(self, part: int, tensors: Mapping[str, Tensor]) -> None:
        self.part, self._tensors = part, tensors
        self.added: set[str] = set()

    def taken(self, name: str) -> Tensor | None:
        """What stands there, contiguous ``[P / W, D]``, which the caller is going to add; None if it cannot."""
        found = self._tensors.get(name)
        if found is not None:
            self.added.add(name)
        return found
