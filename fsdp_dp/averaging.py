"""An exponential moving average of a run's weights, which often scores better than the last ones: their noise averages out.

Weights after a release are public under the guarantee, and so is whatever is computed from them: averaging costs no epsilon
(De et al. 2022, arXiv 2204.13650). ``torch.optim.swa_utils.AveragedModel`` copies the module, which FSDP refuses::

    average = WeightAverage(engine, decay=0.999)       # on every rank
    optimizer.step(); average.update()                 # after every release
    with average.in_place():                           # evaluate, save or export here
        evaluate(model)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fsdp_dp.config import require_number
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.errors import PrivacyError
from fsdp_dp.numerics import accumulate_dtype


class WeightAverage:
    """Of all trainable parameters of an engine's model: this rank's shards, in float32 (float64 for float64 parameters).

    Update n moves the average by ``1 - min(decay, (1 + n) / (10 + n))`` of the way to the weights, so that the first ones
    are soon forgotten. Every method is to be called on all ranks alike.

    Args:
        decay: in [0, 1); the weights of the last ``1 / (1 - decay)`` releases count most.

    Attributes:
        updates: n, so far.
    """

    def __init__(self, engine: PrivacyEngine, decay: float) -> None:
        require_number("decay", decay, at_least=0.0, below=1.0)
        self.decay, self.updates = decay, 0
        self._model, self._inside = engine.model, False
        self._average = [x.detach().to(accumulate_dtype(x.dtype), copy=True) for x in self._shards()]

    @torch.no_grad()
    def update(self) -> None:
        """Take up the weights as they are now."""
        self._refuse_inside("update")
        self.updates += 1
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, x in zip(self._average, self._shards(), strict=True):
            average.lerp_(x.to(average.dtype), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again behind it. Not for training, nor for a step."""
        self._refuse_inside("in_place")
        kept = [x.detach().clone() for x in self._shards()]
        self._inside = True
        try:
            self._put(self._average)
            yield
        finally:
            self._inside = False
            self._put(kept)

    def adopt(self, updates: int) -> None:
        """Go on from the weights that the model has now, as the average after so many updates; also within `in_place`."""
        self.updates = updates
        for average, x in zip(self._average, self._shards(), strict=True):
            average.copy_(x.detach())

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for x, value in zip(self._shards(), values, strict=True):
            x.copy_(value)
        self._model.prepare_forward()

    def _shards(self) -> list[Tensor]:
        """What this rank holds of the parameters; units that an evaluation left gathered hold it again."""
        self._model.prepare_forward()
        parameters = (p.parameter.detach() for p in self._model.parameters)
        return [x.to_local() if isinstance(x, DTensor) else x for x in parameters]

    def _refuse_inside(self, what: str) -> None:
        if self._inside:
            raise PrivacyError(
                f"WeightAverage.{what} within in_place(): the model has the averaged weights there, not its own; "
                "leave the block first"
            )
