"""Losses that average over labels, in every microbatch after the first (rule 8).

``F.cross_entropy(logits, labels)`` divides by how many labels there are. Where no label is ever ignored, that is a fixed
number, and the loss a mean over rows. One ignored label makes it a count of the data, and every row's gradient depends on
the others'. The first microbatch is examined by replaying its loss (see `loss_recording`); in the others, whether some label
is ignored is asked of the device, and known before the release.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fsdp_dp.errors import PrivacyError
from fsdp_dp.modes import put_in, take_out

LOSSES = (F.cross_entropy, F.nll_loss)
_REDUCTION, _IGNORED = 6, 4  # places of the arguments


def averaged_labels(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Tensor | None:
    """The labels of a call of one of `LOSSES` if it averages over those of several rows, else None."""
    labels = args[1] if len(args) > 1 else kwargs.get("target")
    reduction = args[_REDUCTION] if len(args) > _REDUCTION else kwargs.get("reduction", "mean")
    if reduction != "mean" or not isinstance(labels, Tensor) or labels.is_floating_point() or rows < 2:
        return None
    return labels if labels.numel() >= rows else None


class LabelWatch(TorchFunctionMode):
    """Looks at the losses between ``start`` and ``stop``; what it found out is asked for by ``check``.

    ``stop`` is called within backward, which torch has this mode pass on: the mode is then out of torch's stack, and back in
    it afterwards. So every call takes it out, whether it looks or not, and ``check`` does so outside of backward.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._ignored = torch.zeros((), dtype=torch.bool, device=device)
        self._answer = torch.zeros((), dtype=torch.bool, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        self._rows, self._on, self._looked = 0, False, False

    def start(self, rows: int) -> None:
        self.stop()
        self._rows, self._on = rows, True
        put_in(self)

    def stop(self) -> None:
        take_out(self)
        self._on = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._on and func in LOSSES and result.requires_grad:
            self._look(args, kwargs or {})
        return result

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = averaged_labels(args, kwargs, self._rows)
        if labels is not None and labels.device == self._ignored.device:
            ignored = args[_IGNORED] if len(args) > _IGNORED else kwargs.get("ignore_index", -100)
            self._looked = True
            self._ignored |= (labels == ignored).any()
            self._answer.copy_(self._ignored, non_blocking=True)
            if self._ignored.is_cuda:
                self._copied = torch.cuda.Event()
                self._copied.record()

    def forget(self) -> None:
        """What was seen goes with a logical batch that is dropped."""
        self.stop()
        if not self._looked:
            return
        self._looked = False
        self._ignored.zero_()
        self._answer, self._copied = torch.zeros_like(self._answer, pin_memory=self._ignored.is_cuda), None

    def check(self) -> None:
        """Wait for the answer; on CUDA the device came to it before backward.

        Raises:
            PrivacyError: a loss of this logical batch divided by a count of labels that are not ignored.
        """
        self.stop()
        if self._copied is not None:
            self._copied.synchronize()
        if self._looked and bool(self._answer):
            self.forget()
            raise PrivacyError(
                "A loss is the mean over all labels of a microbatch, and some labels are ignored: it divides by a count of "
                "the data, so that one row changes the gradients of the others. Take "
                "fsdp_dp.per_sample_cross_entropy(logits, labels).mean(), the same where no label is ignored. Nothing was "
                "released; the logical batch is dropped by zero_grad() or engine.discard()"
            )
