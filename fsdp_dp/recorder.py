"""From the taps of a forward to the microbatch's per-sample gradients, which its takers are given as backward runs.

    forward    the freeze window closes, every call of a layer is tapped, and each taker told to expect it   [taps]
    backward   each tap turns (a, g) into a per-sample gradient in factored form, for every taker      [layers, gradients]

Inputs that are the same for all rows, and bare parameters, are carried once a row (see `shared_values`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.gradients import Materialized, PerSampleGradient, settled
from fsdp_dp.habits import Form, Habit, form_of
from fsdp_dp.layers import keeps, layouts, per_sample_gradients
from fsdp_dp.logical_batch import LogicalBatch, Microbatch
from fsdp_dp.node_taps import packing
from fsdp_dp.numerics import accumulate_dtype, exact_arithmetic
from fsdp_dp.outside_reads import OutsideReads
from fsdp_dp.parameter_reads import ParameterReads, SharedParameters
from fsdp_dp.records import NO_CALL, Call, Layout, Record, Report
from fsdp_dp.row_layouts import RowLayouts
from fsdp_dp.sharding.base import ShardedModel
from fsdp_dp.shared_values import Meetings, SharedValue, inside_custom_function, is_marked
from fsdp_dp.taps import (
    Bare,
    FreezeWindow,
    Taps,
    at_end_of_backward,
    raw_attribute,
    recomputing,
)


class Recorder:
    """Taps on every layer that has managed parameters, and on parameters outside of layers.

    Args:
        layers: canonical name -> module to tap.
        bare: the parameters outside of layers.
        brief: the parameters whose per-sample gradients are not kept for long (`ClippingPlan.brief`).
        entered: called when a microbatch's backward comes to the model.
        finished: called at its end, under exact arithmetic.

    Attributes:
        current: the microbatch that is recorded.
        in_forward: whether its forward runs now.
        window: what of the parameters may not be changed now.
        layouts: where the rows are in what layers and bare parameters are given.
        meetings: of values without rows with values that have them.
    """

    def __init__(
        self,
        model: ShardedModel,
        layers: Mapping[str, nn.Module],
        bare: Sequence[Bare],
        brief: Collection[str],
        batch: LogicalBatch,
        entered: Callable[[], None],
        finished: Callable[[Microbatch], None],
    ) -> None:
        self._model, self._batch, self._entered, self._finished = model, batch, entered, finished
        self._layers = layers
        self._attributes: dict[nn.Module, dict[str, str]] = {layer: {} for layer in layers.values()}
        for (module, attribute), name in model.names.items():
            if module in self._attributes:
                self._attributes[module][attribute] = name
        self._sites = {layer: tuple(self._attributes[module].items()) for layer, module in layers.items()}
        self._names = {layer: tuple(self._attributes[module].values()) for layer, module in layers.items()}
        sites_of = Counter(model.names.values())
        self._brief = {
            layer: frozenset(
                attribute
                for attribute, name in self._attributes[module].items()
                if name in brief and sites_of[name] == 1
            )
            for layer, module in layers.items()
        }
        self._wanted = {layer: frozenset(self._attributes[module]) for layer, module in layers.items()}
        self.current: Microbatch | None = None
        self.in_forward = False
        self.layouts = RowLayouts()
        self.meetings = Meetings(
            self.layouts,
            is_part=model.is_part,
            is_of_model=lambda module: any(module is m for m in model.root.modules()),
        )
        self.window = FreezeWindow({p.name: p.parameter for p in model.parameters}, batch.refusals_poison)
        self._taps = Taps(
            layers, keeps, self._start_record, self._share_output, self._is_plain, lambda: self.meetings.rows,
            model.root, lambda: self.meetings.learning,
        )  # fmt: skip
        self._reads = ParameterReads(
            self._is_sharing, self._is_without_gradient, self._parameter_per_row, self.meetings
        )
        self._shared_parameters = SharedParameters(bare, self._reads)
        sites = {site: name for site, name in model.names.items() if site[0] in self._attributes}
        self._outside_reads = OutsideReads(sites, self._taps, self._reads)
        self._habits: dict[str, Habit] = {}
        self._report = self._record  # bound once: the garbage collector counts what every tap keeps
        self._same_for_all_rows: dict[str, set[tuple[int, ...]]] = {}
        """Layers that were given what is the same for all rows, and with how many dimensions: they may be given rows, too."""
        self._looks_at_shapes: set[str] = set()

    @property
    def running(self) -> list[nn.Module]:
        """The stack of layers whose forward is running now, in a forward whose calls are followed."""
        return self._taps.running

    @property
    def has_compiled(self) -> bool:
        """Whether `torch.compile` compiled a module that has layers."""
        return self._taps.has_compiled

    def follow_calls(self) -> None:
        """Until the end of the forward that starts now."""
        self._taps.follow(True)
        self._outside_reads.watch()

    def start_forward(self, microbatch: Microbatch) -> None:
        self.current = microbatch
        self.window.close()
        self._reads.forget()
        self._taps.start_forward()
        self._outside_reads.keep()
        self.in_forward = True

    def end_forward(self) -> None:
        self.in_forward = self.meetings.learning = False
        self._taps.follow(False)
        self._outside_reads.keep()
        self._reads.forget()
        self.window.open()

    def let_go_with(self, graph: object) -> None:
        """What is known of the forward's graph goes with ``graph``, at the latest."""
        self._taps.let_go_with(graph)

    def enter_backward(self, microbatch: Microbatch) -> None:
        """Backward comes to the model: by a boundary behind its outputs, or by a tap."""
        with self._batch.refusals_poison():
            if self.in_forward:
                raise PrivacyError(
                    "The model's forward runs a backward through its own layers (torch.autograd.grad of an energy, or a "
                    "gradient penalty), where no row is clipped; return what is differentiated, or freeze these layers"
                )
            if microbatch is not self.current:
                was_run = "whose backward is done" if microbatch.done else "whose own backward was not run"
                raise PrivacyError(
                    f"backward through an earlier forward, of {microbatch.rows} rows, {was_run}: the model was run again "
                    "since, and each forward's backward is expected before the next one. Detach what the program keeps of a "
                    "forward (a state, a cache, a parameter that it read), do not add up losses of several forwards, and use "
                    "torch.no_grad() for forwards without backward"
                )
            if microbatch.done:
                raise PrivacyError(
                    f"A second backward on one microbatch, whose {microbatch.rows} rows are in the sums since its first "
                    "(loss.backward(), or torch.autograd.grad through the model's outputs): its rows would contribute twice, "
                    "and one backward is expected. Add the losses and call backward once; take gradients of inputs from a "
                    "copy of the model that has no engine"
                )
        if not microbatch.entered:
            microbatch.entered = True
            self._taps.start_backward()
            self._entered()
            self._batch.poisoned = "the last backward did not finish"
            self.window.close()
            if microbatch.sums is not None:
                with exact_arithmetic(self._model.device):
                    microbatch.sums.start()

    def discard(self) -> None:
        self.window.open()
        self._reads.forget()
        self._taps.of_forward = []
        self.current, self.in_forward = None, False

    def remove(self) -> None:
        self._outside_reads.remove()
        self._taps.remove()
        self._shared_parameters.remove()
        self.window.remove()

    # ------------------------------------------------------------------------------------------------------- forward

    def _start_record(self, layer: str) -> Report:
        """A tap's report function, made at each call of a layer in forward."""
        microbatch = self.current
        if recomputing():
            return self._recomputed(microbatch, layer)
        if self.meetings.learning:
            self._refuse_replaced(layer, self._layers[layer])
        return functools.partial(self._report, self._expect(layer, self._names[layer]), layer)

    def _refuse_replaced(self, layer: str, module: nn.Module) -> None:
        """A layer that is called with other parameters than its own would report gradients of its own.

        So would one that was given another forward.
        """
        if "forward" in vars(module):
            raise UnsupportedModelError(
                f"Layer '{layer}': its forward was replaced on the instance after make_private, so its rule may not hold. "
                "Do that before make_private, by a class of its own"
            )
        for attribute, name in self._attributes[module].items():
            value = raw_attribute(module, attribute)
            if isinstance(value, Tensor) and not self._model.holds(module, attribute, value):
                raise UnsupportedModelError(
                    f"Layer '{layer}' is called with another tensor in the place of its parameter '{name}' "
                    "(torch.func.functional_call, or an attribute that was set in forward), whose gradient would be taken "
                    "for its own. Use torch.nn.functional with that tensor, or freeze the layer's parameters"
                )

    def _expect(self, layer: str, parameters: Iterable[str], told: str = "Layer '{}' was called") -> Microbatch:
        """Every taker is told that these parameters get one more gradient, by a layer or by what is ``told``."""
        if not self.in_forward or self.current is None:
            with self._batch.refusals_poison():
                raise PrivacyError(
                    f"{told.format(layer)} outside the model's own forward, where its gradient cannot be clipped with the "
                    "rest of the row; do it inside model.forward, or under torch.no_grad()"
                )
        self.current.taps[layer] += 1
        for taker in self.current.takers:
            for name in parameters:
                taker.expect(name)
        return self.current

    def _recomputed(self, microbatch: Microbatch | None, layer: str) -> Report:
        """Activation checkpointing calls a layer again: the tap of the first call reports, this one is idle."""
        if microbatch is None or microbatch.taps[layer] == 0 or not packing():
            raise UnsupportedModelError(
                f"Layer '{layer}' is recomputed in backward, but its forward ran without a graph: reentrant activation "
                "checkpointing hides its gradient from the engine. Use checkpoint(..., use_reentrant=False)"
            )
        return lambda call, inputs, grads: None

    def _share_output(
        self, layer: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Callable[[Tensor], SharedValue] | None:
        """How to carry a layer's outputs if they are the same for all rows: positions without a batch, of ids or of shapes.

        Found out in the first forward, where tensors that descend from the rows are marked. Ids that the program expanded
        to the batch itself have rows already.
        """
        for x in inputs:
            if isinstance(x, SharedValue):
                return self._sharing(layer)
        if not (self.meetings.learning or layer in self._same_for_all_rows or layer in self._looks_at_shapes):
            return None
        if any(isinstance(x, DTensor) for x in inputs):
            return None  # under tensor parallelism every input needs the batch, or its layout is refused
        dimensions = tuple(x.ndim for x in inputs)
        if self.meetings.learning and not any(map(is_marked, inputs)) and not self._has_equal_rows(inputs):
            self._same_for_all_rows.setdefault(layer, set()).add(dimensions)
        if self.meetings.learning and not any(map(is_marked, outputs)):
            self._looks_at_shapes.add(layer)
        if layer in self._looks_at_shapes and any(x.ndim and x.shape[0] % self.meetings.rows for x in outputs):
            return self._sharing(layer)
        return self._sharing(layer) if dimensions in self._same_for_all_rows.get(layer, ()) else None

    def _is_plain(self, layer: str) -> bool:
        """Whether `_share_output` would find nothing in tensors that are no shared values, nor picked from rows."""
        known = self.meetings
        return not (
            known.learning
            or layer in self._same_for_all_rows
            or layer in self._looks_at_shapes
            or layer in self._taps.picked
        )

    def _has_equal_rows(self, inputs: Sequence[Tensor]) -> bool:
        rows = self.meetings.rows
        if rows < 2 or not inputs:
            return False
        return all(x.ndim > 1 and x.shape[0] == rows and bool((x == x[:1]).all()) for x in inputs)

    def _sharing(self, owner: str) -> Callable[[Tensor], SharedValue]:
        rows = self.meetings.rows
        return lambda x: SharedValue(x.expand(rows, *x.shape), owner, self.meetings)

    def _is_sharing(self) -> bool:
        """Whether the program that reads a bare parameter now is the model's training forward, or a part run again."""
        return torch.is_grad_enabled() and (self.in_forward or recomputing())

    def _is_without_gradient(self) -> bool:
        """Whether it reads it under ``torch.no_grad()``, and not within a function whose backward may give it a gradient."""
        runs = self.in_forward or (recomputing() and packing())
        return runs and not torch.is_grad_enabled() and not inside_custom_function()

    def _parameter_per_row(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter that the program reads itself, carried once a row behind a tap."""
        self.meetings.refuse_sharded(parameter, name)
        if recomputing():
            report = self._recomputed(self.current, name)
        else:
            told = "Parameter '{}', which the forward gave away (to the loss?), was used"
            report = self._shared_report(self._expect(name, [name], told), name)
        with torch._C.DisableTorchFunction():  # no use of the parameter that the watch should look at
            expanded = parameter.detach().expand(self.meetings.rows, *parameter.shape)
        (per_row,) = self._taps.through(NO_CALL, report, [expanded], [])
        return per_row

    # ------------------------------------------------------------------------------------------------------ backward

    def _start_recording(self, microbatch: Microbatch) -> None:
        if microbatch.recording and not microbatch.done and microbatch is self.current:
            return
        self.enter_backward(microbatch)
        if not microbatch.recording:
            microbatch.recording = True
            at_end_of_backward(self._finish_backward)
            for report in self._taps.unreached():  # or their groups would wait for the end, longer than on other ranks
                report(NO_CALL, (), (None,))

    def _record(
        self,
        microbatch: Microbatch,
        layer: str,
        call: Call,
        inputs: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
    ) -> None:
        self._start_recording(microbatch)
        gradients: Mapping[str, PerSampleGradient] = {}
        if any(grad is not None for grad in grads):
            _note_dtypes(microbatch, grads)
            form = form_of(call, inputs, grads, microbatch.rows)
            known = self._habits.get(layer)
            if known is not None and form == known.form and known.layouts is self.layouts.fixed:
                gradients = known.gradients(inputs[0], grads[0])
            else:
                with exact_arithmetic(self._model.device):
                    gradients = self._examined(microbatch, layer, Record(call, inputs, grads), form)
        for taker in microbatch.takers:
            for attribute, name in self._sites[layer]:
                taker.report(name, gradients.get(attribute))

    def _examined(
        self, microbatch: Microbatch, layer: str, record: Record, form: Form | None
    ) -> dict[str, PerSampleGradient]:
        """The per-sample gradients of a record that is not like the layer's last one."""
        module, wanted = self._layers[layer], self._wanted[layer]
        record, complete = self._model.localize(layer, module, record)
        layout = self._layout(layer, record, microbatch.rows)
        arranged = record.arranged(layout, microbatch.rows)
        try:
            gradients = per_sample_gradients(module, arranged, wanted)
        except UnsupportedModelError as refusal:  # a rule knows the module, and not where in the model it is
            raise UnsupportedModelError(f"Layer '{layer}': {refusal}") from refusal
        if layout == "merged":
            gradients = {name: gradient.regroup(microbatch.rows) for name, gradient in gradients.items()}
        # Uses that are added up are kept as factors, which take the room of one use each.
        brief = self._brief[layer] if microbatch.taps[layer] == 1 else frozenset()
        kept = {name: settled(gradient, soon=name in brief) for name, gradient in complete(gradients).items()}
        if form is not None and layout == "rows" and self.layouts.fixed is not None:
            settles = any(kept[name] is not gradient for name, gradient in gradients.items())
            self._habits[layer] = Habit(
                form, module, wanted, self.layouts.fixed, self._model.device, gradients, settles=settles, brief=brief
            )
        return kept

    def _layout(self, layer: str, record: Record, rows: int) -> Layout:
        """Where the rows are in a record. Raises UnsupportedModelError if that cannot be relied on."""
        inputs = [record.inputs[0].shape] if record.call.spec is None else []
        shapes = [*inputs, *(grad.shape for grad in record.grads if grad is not None)]
        if rows == 1:
            return "rows" if all(len(shape) > 0 and shape[0] == 1 for shape in shapes) else "merged"
        layout = self.layouts.of(layer, shapes, rows, layouts(self._layers[layer]))
        if layout is None:
            raise UnsupportedModelError(
                f"Layer '{layer}': its {'input' if inputs else 'output'} has shape {tuple(shapes[0])} and its output "
                f"gradient {tuple(shapes[-1])}, but the microbatch has {rows} rows, so its gradient cannot be told apart "
                "by row. Give every layer an input that has the batch as its first dimension, and call it in the first "
                "microbatch already, where that is verified"
            )
        return layout

    def _shared_report(self, microbatch: Microbatch, name: str) -> Report:
        def report(call: Call, inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> None:
            self._start_recording(microbatch)
            gradient = None
            with exact_arithmetic(self._model.device):
                if grads[0] is not None:
                    _note_dtypes(microbatch, grads)
                    g_B = grads[0].reshape(microbatch.rows, *(grads[0].shape[1:] or (1,)))
                    gradient = Materialized(g_B.to(accumulate_dtype(g_B.dtype)))
            for taker in microbatch.takers:
                taker.report(name, gradient)

        return report

    def _finish_backward(self) -> None:
        microbatch = self.current
        assert microbatch is not None
        self.window.refuse_written("backward")
        with exact_arithmetic(self._model.device):
            self._finished(microbatch)
        self._model.after_backward()
        microbatch.norms = None  # it holds every record until the garbage collector finds it
        microbatch.done, self._batch.poisoned = True, None
        self._batch.intake.finished()
        self._reads.forget()
        self.window.open()


def _note_dtypes(microbatch: Microbatch, grads: Sequence[Tensor | None]) -> None:
    for grad in grads:
        if grad is None or grad.dtype is microbatch.narrowest:
            continue
        if grad.dtype.itemsize < microbatch.narrowest.itemsize:
            microbatch.narrowest = grad.dtype
