"""A deep model from two shallow ones: blocks repeat, so every number of a step is a line in their count.

At one place of the step (say, the backward of the last block but one) each further block adds the same: its shards, its
activations, its records. `tests/unit/test_planning.py` compares with traces of deeper models, to the byte.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Self

from fsdp_dp.planning.trace import EDGE, Step, Trace, trace

SHALLOW = 2 * EDGE
"""Blocks of the shallower model: each of the ends that `trace` tells apart is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """A step at any depth: traces at `SHALLOW` blocks and at one more."""

    shallow: Trace
    deeper: Trace

    @classmethod
    def of(cls, step: Step) -> Self:
        return cls(shallow=trace(step.with_layers(SHALLOW)), deeper=trace(step.with_layers(SHALLOW + 1)))

    def at(self, layers: int) -> Trace:
        """The trace of a model of so many blocks, `SHALLOW` at least."""
        before, after = self.shallow, self.deeper
        return Trace(
            peaks={
                segment: _line(peak, after.peaks[segment], layers)
                for segment, peak in before.peaks.items()
                if segment in after.peaks
            },
            calls=_line(before.calls, after.calls, layers),
            sent=_line(before.sent, after.sent, layers),
        )


def _line(before: Mapping[str, int], after: Mapping[str, int], layers: int) -> Counter[str]:
    kinds = before.keys() | after.keys()
    return Counter({k: before.get(k, 0) + (after.get(k, 0) - before.get(k, 0)) * (layers - SHALLOW) for k in kinds})


def predict(step: Step) -> Trace:
    """The trace of a step, of any depth."""
    layers = step.config.model.layers
    return trace(step) if layers <= SHALLOW + 1 else Lines.of(step).at(layers)
