"""What a logical batch is made of, and whether its sums may be released.

States: nothing pending -> (forward, backward)* -> pending -> released -> consumed by optimizers. An exception in between
poisons it: it can only be discarded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fsdp_dp.clipped_sum import ClippedSum, MeasuredNorms
from fsdp_dp.clipping import RowTotals
from fsdp_dp.errors import PrivacyError
from fsdp_dp.intake import Intake


@dataclasses.dataclass(eq=False)
class Microbatch:
    """One forward and its backward.

    ``sums`` is given the per-sample gradients, ``norms`` the norm of every parameter where that is asked for. A
    rehearsal (see `independence`) has the latter alone: it is measured and never summed. ``taps`` counts the calls of each
    layer; ``totals`` are over the clipping groups that are finished.
    """

    rows: int
    mask_B: Tensor
    vouched: bool
    sums: ClippedSum | None = None
    norms: MeasuredNorms | None = None
    narrowest: torch.dtype = torch.float64
    taps: Counter[str] = dataclasses.field(default_factory=Counter)
    entered: bool = False
    recording: bool = False
    done: bool = False

    @functools.cached_property
    def totals(self) -> RowTotals:
        return RowTotals.zeros(self.mask_B)

    @property
    def rehearsal(self) -> bool:
        return self.sums is None

    @property
    def takers(self) -> Sequence[ClippedSum | MeasuredNorms]:
        norms, sums = self.norms, self.sums
        if norms is None:
            return () if sums is None else (sums,)
        return (norms,) if sums is None else (norms, sums)


class LogicalBatch:
    """The microbatches since the last release.

    Attributes:
        intake: pairs microbatches that were handed out with forwards.
        pending: how many are in the sums.
        poisoned: why nothing may be released, or None.
    """

    def __init__(self) -> None:
        self.intake = Intake()
        self.pending = 0
        self.poisoned: str | None = None

    def poison(self, reason: str) -> None:
        """The first reason stays."""
        self.poisoned = self.poisoned or reason

    def raise_if_poisoned(self) -> None:
        if self.poisoned is not None:
            raise PrivacyError(
                f"Nothing was released: {self.poisoned}, so the sums of this logical batch are incomplete. Call "
                "optimizer.zero_grad() or engine.discard() on all ranks and go on with the next logical batch"
            )

    @contextmanager
    def refusals_poison(self) -> Iterator[None]:
        """A refused microbatch is missing from the sums, so they cannot be released (rule 1)."""
        try:
            yield
        except BaseException:
            if self.pending or self.intake.source != "free":
                self.poison("a microbatch was refused")
            raise

    def discard(self) -> None:
        self.intake.discard()
        self.pending, self.poisoned = 0, None

    def released(self) -> None:
        self.pending = 0
        self.intake.released()
