"""Which rows the model is being run on: every microbatch's mask meets one forward, and that forward one backward (rule 7).

The loader hands out microbatches and the program runs the model on them; this is where both must agree. A row that is
run twice would contribute twice, and a row that is dropped because of what it holds is not a row of a Poisson sample.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fsdp_dp.errors import PrivacyError


class Intake:
    """The microbatches of the current logical batch, as handed out and as run.

    ``source`` says where masks come from now: a logical batch of the engine's loader, a ``with engine.microbatch(mask)``
    block, or nowhere (``free``: the program's own loop, every row real).
    """

    def __init__(self) -> None:
        self.source: Literal["free", "loader", "block"] = "free"
        self._waiting: list[Tensor] = []
        self._loader: int | None = None
        self._complete = True
        self._abandoned = False
        self.unfinished = False
        self._drop_if_unfinished = False

    def start_logical_batch(self, loader: int) -> None:
        """A new draw; a forward of an earlier one that got no backward is left behind with it."""
        self.discard()
        self._waiting.clear()
        self.source, self._complete, self._abandoned = "loader", False, False
        self._loader = loader

    def end_logical_batch(self, loader: int) -> None:
        """The loader hands out the last microbatch of its logical batch."""
        self._complete = self._complete or loader == self._loader

    def take(self, mask_B: Tensor, loader: int) -> None:
        if loader != self._loader:
            raise PrivacyError(
                "A microbatch of a logical batch that is over: another loader's was started since (zip of two loaders?). "
                "One release covers one draw: finish and step each logical batch before taking the next"
            )
        self._waiting.append(mask_B)

    def open_block(self, mask_B: Tensor) -> None:
        if not isinstance(mask_B, Tensor):
            raise PrivacyError(
                f"engine.microbatch(mask): found a {type(mask_B).__name__}, expected a tensor of a bool for each row, False "
                "for padding: torch.ones(rows, dtype=torch.bool) where there is none"
            )
        if self.source == "loader":
            raise PrivacyError(
                "engine.microbatch(mask) within a logical batch of engine.loader: the loader's microbatches carry their "
                "own masks; run the model on them directly"
            )
        if self.source == "block":
            raise PrivacyError("engine.microbatch(mask) within another one: end each block before the next begins")
        self.source, self._waiting = "block", [mask_B]

    def close_block(self) -> None:
        """Raises PrivacyError unless exactly one forward and one backward were run in the block."""
        left = bool(self._waiting) or self.unfinished
        if self.source == "block":
            self.source, self._waiting = "free", []
            if left:
                raise PrivacyError("engine.microbatch(mask): the block ended without one forward and one backward")

    def next_mask(self, rows: int, *, pending: bool) -> tuple[Tensor, bool]:
        """The mask of a forward on ``rows`` rows, and whether the loader vouches for it.

        Raises:
            PrivacyError: the forward does not belong to a microbatch that waits for one, or the mask does not fit.
        """
        if self._drop_if_unfinished and self.unfinished:
            waiting = list(self._waiting)
            self.discard()
            self._waiting, self._abandoned = waiting, self._abandoned or bool(waiting)
        self._check_turn(pending)
        mask = self._waiting.pop() if self._waiting else torch.ones(rows, dtype=torch.bool)
        if mask.ndim != 1 or mask.numel() != rows:
            raise PrivacyError(
                f"The mask has shape {tuple(mask.shape)}, but the model's first input has {rows} rows; the mask needs "
                "one entry for every row of the microbatch"
            )
        self.unfinished = True
        return mask, self.source == "loader"

    def _check_turn(self, pending: bool) -> None:
        if self._abandoned and self._waiting:
            raise PrivacyError(
                "This logical batch was discarded (by engine.discard(), or by zero_grad() between its microbatches), so the "
                "rest of it cannot be released alone. Call zero_grad() after optimizer.step() only; after a discard, leave "
                "the logical batch (break) and go on with the next one"
            )
        if len(self._waiting) > 1:
            raise PrivacyError(
                f"{len(self._waiting)} microbatches were taken from the loader before this forward, so masks and rows "
                "no longer belong together: run forward and backward of each microbatch before taking the next"
            )
        if self.unfinished and (pending or self.source != "free"):
            raise PrivacyError(
                "The last forward got no backward before this one, so its rows would be missing. Run forwards that need "
                "none under torch.no_grad(); to leave out a logical batch, engine.discard() on all ranks"
            )
        if self.source != "free" and not self._waiting:
            raise PrivacyError(
                "A forward without a new microbatch: this one was run before, and its rows would contribute twice. Take "
                "the next microbatch first; run forwards that need no backward under torch.no_grad()"
            )

    def finished(self) -> None:
        """The forward's backward is done."""
        self.unfinished = self._drop_if_unfinished = False

    def zero_grad(self) -> None:
        """``zero_grad`` between forward and backward is a habit if the backward follows, and a discard if it does not."""
        self._drop_if_unfinished = self.unfinished

    def check_release(self) -> None:
        """Raises PrivacyError if some of the logical batch's rows are still to come."""
        if self._waiting or self.unfinished:
            raise PrivacyError(
                "optimizer.step(): a microbatch was not run forward and backward; run every microbatch of the logical "
                "batch, or engine.discard() on all ranks"
            )
        if not self._complete:
            raise PrivacyError(
                "optimizer.step() before the logical batch is over: a release covers all microbatches of its draw. Step "
                "once for each logical batch, after its last microbatch"
            )

    def released(self) -> None:
        if self.source == "loader":
            self.source = "free"

    def discard(self) -> None:
        """Drop what was run; the rest of a logical batch that is not over is refused from here on."""
        rest = self.source == "loader" and (not self._complete or bool(self._waiting))
        self._abandoned = self._abandoned or rest
        self.source, self._complete = "free", True
        if not self._abandoned:
            self._waiting.clear()
        self.unfinished = self._drop_if_unfinished = False
