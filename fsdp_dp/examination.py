"""What is looked at while the program trains, so that a model or a loss that couples rows is refused (rules 7 to 9).

Every forward of a kind not seen before is watched (see `watch`), the first microbatch whose rows differ is run again,
twice, with some of them exchanged, before anything is released (see `independence`), and losses over labels are looked
at in every one (see `label_watch`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._pytree import tree_leaves

from fsdp_dp.clipped_sum import MeasuredNorms
from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.independence import FirstMicrobatch
from fsdp_dp.label_watch import LabelWatch
from fsdp_dp.logical_batch import LogicalBatch, Microbatch
from fsdp_dp.marks import is_picked
from fsdp_dp.methods import Measured
from fsdp_dp.recorder import Recorder
from fsdp_dp.sharding.base import ShardedModel
from fsdp_dp.taps import is_of_rows, with_boundary
from fsdp_dp.watch import ConstantDivisor, FirstForward, Uncompiled, buffer_versions

EVERY, EARLY = 1000, (50, 500)
"""Releases after which forwards are watched again."""


class Examination:
    """Beside a `Recorder`, around the same forwards and backwards.

    Attributes:
        passed: the check before the first release saw that no row's gradient depends on another.
        measured: parameter -> how its gradients were measured, in the first microbatch. Not private.
    """

    def __init__(self, model: ShardedModel, batch: LogicalBatch, recorder: Recorder) -> None:
        self._model, self._batch, self._recorder = model, batch, recorder
        self.passed = self._passed_over = self._checked = self._ran_again = False
        self.measured: dict[str, Measured] = {}
        self._first: FirstMicrobatch | None = None
        self._watch: FirstForward | None = None
        self._watched: set[tuple[Any, ...]] = set()
        self._kind_now: tuple[Any, ...] = ()
        self._buffer_versions: list[tuple[int, int]] = []
        self._releases = 0
        self._uncompiled = Uncompiled()
        self._divisor = ConstantDivisor()
        self._labels, self._averages_over_labels = LabelWatch(model.device), False

    # ------------------------------------------------------------------------------------------- forward and backward

    def check_arguments(self, kwargs: dict[str, Any]) -> None:
        self._divisor.check(kwargs)

    def start_forward(self, microbatch: Microbatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        root, recorder = self._model.root, self._recorder
        if not microbatch.rehearsal:
            self._keep_to_rehearse(microbatch, args, kwargs)
        self._end_watch()
        if self._first is not None and not self._checked:
            self._uncompiled.start()  # under the mode that listens to the loss graphs would be others, and broken by it
        self._kind_now = self._kind(microbatch.rows)
        if self._kind_now not in self._watched or self._buffers_moved() or recorder.meetings.wants:
            self._uncompiled.start()
            recorder.follow_calls()
            self._watch = FirstForward(root, self._model.names, recorder.running, (args, kwargs), microbatch.rows)
            self._watch.__enter__()
        recorder.layouts.learning = microbatch.norms is not None or self._passed_over
        recorder.meetings.start(microbatch.rows, learning=self._watch is not None)

    def _keep_to_rehearse(self, microbatch: Microbatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of each logical batch the first microbatch, or a later one that shows more, until a rehearsal has shown all."""
        if self.passed or (self._batch.pending and (self._first is None or microbatch.rows == 1)):
            return
        managed = frozenset(id(p.parameter) for p in self._model.parameters)
        found = FirstMicrobatch(
            self._model.root, microbatch.rows, args, kwargs, self._model.device, managed, self._model.data_rank,
            padding_only=not bool(microbatch.mask_B.any()),
        )  # fmt: skip
        if self._batch.pending and self._first is not None and found.shows <= self._first.shows:
            return
        self._forget_first()
        self._recorder.layouts.forget()
        microbatch.norms = MeasuredNorms(self._model.device)
        self._first = found

    def end_forward(self, *, failed: bool) -> None:
        """Raises UnsupportedModelError if the forward did what only running it shows, and must not be."""
        watch = self._end_watch()
        if failed:
            self._uncompiled.stop()
        elif watch is not None:
            watch.verify()
            if watch.settled:
                self._watched.add(self._kind_now)

    def _end_watch(self) -> FirstForward | None:
        """Also of a forward whose end nobody told of: hooks are not called when a user interrupts it."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)
        return watch

    def bounded(self, microbatch: Microbatch, output: Any) -> Any:
        """The outputs with a boundary, where backward comes back to the model.

        Raises:
            UnsupportedModelError: there is no tensor in them that requires grad, or one that is picked from all rows.
        """
        picked = [x for x in tree_leaves(output) if is_of_rows(x) and is_picked(x)]
        if microbatch.rows > 1 and any(x.ndim for x in picked):
            self._batch.poison("the model is not supported")
            raise UnsupportedModelError(
                "The model's output holds entries that were picked from all rows by the data or by chance (shuffled rows, "
                "positions without padding), so a row's loss may be another row's. Keep the batch as the first dimension, "
                "or run one row a microbatch"
            )
        recorded = self._first if microbatch.norms is not None and not microbatch.rehearsal else None

        def entered(index: int, grad: Tensor) -> None:
            self._recorder.enter_backward(microbatch)
            if recorded is not None:
                recorded.saw_output_grad(index, grad)

        bounded, found = with_boundary(output, entered)
        self._recorder.let_go_with(entered)
        if not found:
            raise UnsupportedModelError(
                f"The model's output ({type(output).__name__}) holds no tensor that requires grad: return a tensor, or a "
                "tuple, list or dict of tensors, or register its class with torch.utils._pytree.register_dataclass"
            )
        if recorded is not None:
            recorded.saw_outputs(bounded)
        elif self._averages_over_labels and not microbatch.rehearsal:
            self._labels.start(microbatch.rows)
        return bounded

    def entered_backward(self) -> None:
        self._labels.stop()
        if self._first is not None:
            self._averages_over_labels |= self._first.loss.averages_over_labels

    def finished_backward(self, microbatch: Microbatch) -> None:
        if microbatch.norms is not None and self._first is not None:
            measured = microbatch.norms.finish()
            norm_sq = {name: m.terms.norm_sq for name, m in measured.items()}
            self._first.measured(norm_sq, microbatch.narrowest)
            if not microbatch.rehearsal:
                self.measured = measured
        self._uncompiled.stop()

    # -------------------------------------------------------------------------------------------------------- release

    def check_labels(self) -> None:
        """Raises PrivacyError if a loss since the last release divided by a number of labels that rows decide."""
        try:
            self._labels.check()
        except PrivacyError:
            self._batch.poison("a loss couples rows")
            raise

    def check_first_microbatch(self) -> None:
        """Run it again with some rows exchanged, before anything is released (see `independence`).

        Raises:
            PrivacyError: a row's gradient changed with other rows, or this could not be found out.
        """
        first, current, self._checked = self._first, self._recorder.current, True
        if first is None or not first.was_measured:
            return
        if first.loss.asked is False:
            raise PrivacyError(
                "The loss was not run backward by loss.backward(), so whether it couples rows could not be examined before "
                "the first release; call loss.backward() instead of torch.autograd.backward"
            )
        first.loss.stop()
        if not self._ran_again and self._model.any_rank(first.rows == 1):
            self._start_rehearsal(first.rows)
            first.run_again()
            self._ran_again = True
        told = False
        for run in range(first.RUNS if self._model.any_rank(first.shows > 0) else 0):
            self._start_rehearsal(first.rows)
            first.run_exchanged(run)
            if self._model.any_rank(first.may_be_noise):
                self._start_rehearsal(first.rows)
                first.run_unchanged()
            told |= first.compare()
        self.passed = self._model.any_rank(told)
        if self.passed:  # the program is the same on all ranks, but some had a row of padding only
            layouts = self._recorder.layouts
            layouts.adopt(self._model.every_rank(layouts.known if told else {}))
        self._forget_first()
        self._recorder.current = current

    def _start_rehearsal(self, rows: int) -> None:
        mask_B = torch.ones(rows, dtype=torch.bool)
        self._recorder.current = Microbatch(rows, mask_B, vouched=False, norms=MeasuredNorms(self._model.device))
        self._uncompiled.start()

    def discard(self) -> None:
        self._end_watch()
        self._forget_first()
        self._uncompiled.stop()
        self._labels.forget()

    def released(self) -> None:
        """Now and then every kind of forward is watched once more, for what the program did not do in the first ones.

        Not where something is compiled, which would run as written then, and may need more memory than there is.
        """
        self._releases += 1
        if (self._releases in EARLY or self._releases % EVERY == 0) and not self._recorder.has_compiled:
            self._watched.clear()

    def pass_over(self) -> None:
        """As after the first release, of a model that has been found to be good: a forecast looks at no values."""
        self.passed = self._passed_over = True
        self._watched |= {self._kind(rows) for rows in (1, 2)}
        self._buffer_versions = buffer_versions(self._model.tree)

    def _kind(self, rows: int) -> tuple[Any, ...]:
        """Of a forward: the modes of modules, hooks on all of them, and whether one row may be taken for what is the same
        for all."""
        return rows == 1, tuple(_global_forward_hooks), *(module.training for module in self._model.tree.modules())

    def _buffers_moved(self) -> bool:
        """Whether a buffer was written since the last training forward began; the next one is then watched again."""
        before, self._buffer_versions = self._buffer_versions, buffer_versions(self._model.tree)
        return before != self._buffer_versions

    def _forget_first(self) -> None:
        if self._first is not None:
            self._first.loss.stop()
            self._first = None
