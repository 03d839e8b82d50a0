"""A deep model from two shallow ones: blocks repeat, so every number of a step is a line in their count.

At one place of the step (say, the backward of the last block but one) each further block adds the same: its shards, its
activations, its records. Two at a time, since units take turns in two buckets (`sharding.sums`): which of them the largest
unit meets depends on whether their number is even. `tests/unit/test_planning.py` compares with traces of deeper models.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Self

from fsdp_dp.planning.options import decoder
from fsdp_dp.planning.trace import EDGE, Step, Trace, trace

SHALLOW = 2 * EDGE
"""Blocks of the shallower model: each of the ends that `trace` tells apart is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """A step at depths ``layers``, ``layers + 2``, ...: traces of the first two."""

    layers: int
    shallow: Trace
    deeper: Trace

    @classmethod
    def of(cls, step: Step, *, odd: bool = False) -> Self:
        """For all odd or all even depths, from `SHALLOW` on."""
        layers = SHALLOW + odd
        return cls(layers=layers, shallow=trace(step.with_layers(layers)), deeper=trace(step.with_layers(layers + 2)))

    def at(self, layers: int) -> Trace:
        """The trace of a model of so many blocks."""
        before, after, pairs = self.shallow, self.deeper, (layers - self.layers) // 2
        return Trace(
            peaks={
                segment: _line(peak, after.peaks[segment], pairs)
                for segment, peak in before.peaks.items()
                if segment in after.peaks
            },
            calls=_line(before.calls, after.calls, pairs),
            sent=_line(before.sent, after.sent, pairs),
            sent_by_optimizer=_line(before.sent_by_optimizer, after.sent_by_optimizer, pairs),
        )


def _line(before: Mapping[str, int], after: Mapping[str, int], pairs: int) -> Counter[str]:
    kinds = before.keys() | after.keys()
    return Counter({k: before.get(k, 0) + (after.get(k, 0) - before.get(k, 0)) * pairs for k in kinds})


def predict(step: Step) -> Trace:
    """The trace of a step, of any depth."""
    layers = decoder(step.config).layers
    return trace(step) if layers < SHALLOW + 4 else Lines.of(step, odd=layers % 2 == 1).at(layers)
