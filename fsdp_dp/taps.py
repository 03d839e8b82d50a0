"""Recording (input, output gradient) of every layer, while autograd computes no weight gradient.

Three mechanisms, each independent of what is recorded:

* a *tap*: an identity in the graph behind a layer's output that keeps the layer's input through
  ``save_for_backward`` (so activation checkpointing and saved-tensor hooks apply to it) and reports both in backward;
  or something cheaper, where that does the same (see `node_taps`);
* the *freeze window*: trainable parameters do not require gradients from the root's forward to the end of backward,
  so FSDP neither computes nor reduces weight gradients;
* a *boundary*: an identity on the root's outputs. Between it and the start of backward the window is open, so a
  parameter that the loss uses directly (a weight penalty, say) gets a gradient, and that is refused (rule 9);
  the first thing that backward does is to close the window again, before FSDP looks.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import _global_forward_hooks, register_module_forward_hook
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from fsdp_dp.compiled import CompiledModule, as_written, compiled_modules, refuse_cuda_graphs
from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.graph_identity import TappedClasses
from fsdp_dp.layers import has_entries, is_product
from fsdp_dp.layers.leaf import is_proven
from fsdp_dp.marks import PICKED_REFUSED, is_picked
from fsdp_dp.node_taps import NodeTap, come_last, node_of
from fsdp_dp.parts import Opened
from fsdp_dp.records import NO_CALL, Call, Report
from fsdp_dp.shared_values import SharedValue, unwrapped


class _Tap(torch.autograd.Function):
    """Identity on the first ``outputs`` of ``tensors``, the layer's outputs; the rest are the inputs that it keeps.

    The anchor is a leaf that requires grad, so an embedding's output does as well.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, call: Call, report: Report, outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors[outputs:])
        ctx.set_materialize_grads(False)
        ctx.call, ctx.report = call, report
        if outputs == 1:
            return (tensors[0].detach(),)
        return tuple(x.detach() for x in tensors[:outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = [x.detach() for x in ctx.saved_tensors]
        found = [None if g is None or not g.numel() else g for g in grads]  # an expert may be given no token at all
        ctx.report(ctx.call, tuple(inputs), tuple(found))
        return None, None, None, None, *grads, *([None] * len(inputs))


class _Boundary(torch.autograd.Function):
    """Identity on one output of the root; tells when backward enters the model."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, entered: Callable[[int, Tensor, bool], None], index: int) -> Tensor:
        ctx.entered, ctx.index = entered, index
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        ctx.entered(ctx.index, grad_output, torch.compiler.is_dynamo_compiling())
        return grad_output, None, None


_apply = super(torch.autograd.Function, _Tap).apply
"""Without torch's Python in front of it, which looks for transforms of `torch.func`: a third of what a tap costs."""


def with_boundary(outputs: Any, entered: Callable[[int, Tensor], None]) -> tuple[Any, bool]:
    """``outputs`` with a boundary on every tensor that requires grad, and whether there was one.

    In backward, ``entered(index, gradient)`` is called for the index-th of these tensors.
    """
    indices = itertools.count()

    def enter(index: int, grad: Tensor, compiling: bool) -> None:
        if compiling:
            raise UnsupportedModelError(
                "backward runs inside of a function that torch.compile compiled, which would compile the engine as well. "
                "Call loss.backward() outside of it"
            )
        entered(index, grad)

    enter = as_written(enter)

    def wrap(x: Any) -> Any:
        return _Boundary.apply(x, enter, next(indices)) if is_of_rows(x) else x

    return tree_map(wrap, outputs), next(indices) > 0


def is_of_rows(x: Any) -> bool:
    """Of the root's outputs: a tensor that backward comes through. One that gives a parameter away is none of these."""
    return isinstance(x, Tensor) and not isinstance(x, SharedValue) and x.requires_grad


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing's recompute."""
    return torch._C._current_graph_task_id() != -1


def _is_reached(node: Any) -> bool:
    """Whether the current backward runs this node of the graph (None: the graph is gone)."""
    return node is not None and torch._C._will_engine_execute_node(node)


class Taps:
    """Taps on a set of layers. ``start`` is asked for a report function at every call of a layer.

    Args:
        layers: canonical name -> module.
        keeps: whether a layer's record needs all that the layer was given, or its first input alone.
        start: called with the layer's name in forward; returns what to do in backward.
        share: called with the layer's name, inputs and outputs; a function that makes an output a `SharedValue`, for
            outputs that are the same for all rows, else None.
        is_plain: whether the layer's calls are now known to be of rows alone, if its input looks like it.
        rows: how many the microbatch has.
        root: the model.
        is_watched: whether this forward is one whose calls are looked at.

    Attributes:
        running: the stack of layers whose forward is running now, while calls are followed.
        picked: layers that were given entries which a program picked along the rows (see `marks`).
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        keeps: Callable[[nn.Module], Literal["first", "all"]],
        start: Callable[[str], Report],
        share: Callable[[str, Sequence[Tensor], Sequence[Tensor]], Callable[[Tensor], SharedValue] | None],
        is_plain: Callable[[str], bool],
        rows: Callable[[], int],
        root: nn.Module,
        is_watched: Callable[[], bool],
    ) -> None:
        self._layers = layers
        self._start, self._share, self._is_plain, self._rows = start, share, is_plain, rows
        self._versions: dict[nn.Module, list[int]] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self.running: list[nn.Module] = []
        self._made: tuple[Any, list[int]] | None = None
        self.of_forward: list[tuple[Any, Report, RemovableHandle | None]] = []
        self._handles: list[RemovableHandle] = []
        self._following: dict[nn.Module | None, list[RemovableHandle]] = {}
        self._always: set[nn.Module] = set()
        self._follows_all = False
        self._hook_ids: dict[str, int] = {}
        self._shapes: dict[torch.Size, torch.Size] = {}
        self._opened = Opened(layers)
        self.picked: set[str] = set()
        # Of an FSDP unit the output must be no view: a write to that would drop FSDP's own hook.
        self._products = {n for n, layer in layers.items() if is_product(layer) and not isinstance(layer, FSDPModule)}
        self._root = root
        refuse_cuda_graphs(root)
        self._compiled = [
            CompiledModule(
                name, module, start=start, is_plain=is_plain, is_watched=is_watched, recomputing=recomputing,
                append=lambda node: self.of_forward.append(node),
            )
            for module, name in compiled_modules(root, layers.values()).items()
        ]  # fmt: skip
        self._compiled_in = {layer: compiled for compiled in self._compiled for layer in compiled.module.modules()}
        self._classes = TappedClasses(layers.values())
        for name, layer in layers.items():
            everything = keeps(layer) == "all"
            if everything:
                enter = as_written(self._note_versions)
                self._handles.append(layer.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            leave, compiled = as_written(self._leave(name, everything)), self._compiled_in.get(layer)
            if compiled is not None:
                leave = compiled.hook(name, layer, leave, everything=everything)
            hook = layer.register_forward_hook(leave, prepend=True, with_kwargs=True)
            if compiled is not None:
                compiled.hooked(name, hook)
            self._handles.append(hook)
            if not name:  # the root itself is always followed: its hooks run when `follow` is asked for
                self.always_follow(layer)
            self._hook_ids[name] = hook.id

    def remove(self) -> None:
        self._always.clear()
        self.follow(False)
        for compiled in self._compiled:
            compiled.remove()
        self._classes.remove()
        self._opened.remove()
        for handle in self._handles:
            handle.remove()

    def follow(self, wanted: bool) -> None:
        """Know from now on which layers are ``running``; or stop to, which spares every call of a layer two hooks."""
        if wanted and not self._follows_all:
            refuse_cuda_graphs(self._root)
            self._follows_all = True
            if _global_forward_hooks:
                handle = register_module_forward_hook(as_written(self._note_made))
                self._following[None] = [handle]
                _global_forward_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
            for layer in self._layers.values():
                if layer not in self._following:
                    self._following[layer] = self._follow(layer)
        elif not wanted:
            for followed in [layer for layer in self._following if layer not in self._always]:
                for handle in self._following.pop(followed):
                    handle.remove()
            self._follows_all = False
            self.running.clear()
            self._made = None

    @property
    def has_compiled(self) -> bool:
        return bool(self._compiled)

    def can_follow(self, layer: nn.Module) -> bool:
        """Whether it would be seen that ``layer`` runs: not in the middle of a compiled graph."""
        return layer not in self._compiled_in

    def always_follow(self, layer: nn.Module) -> None:
        """Know of a layer whether it is ``running``, in every forward that comes, and in this one where all are followed."""
        self._always.add(layer)
        if layer not in self._following:
            self._following[layer] = self._follow(layer)

    def _follow(self, layer: nn.Module) -> list[RemovableHandle]:
        """Hooks of the program that run before the layer's forward, or after it, are not the layer: they may read it."""
        return [
            layer.register_forward_pre_hook(as_written(self._enter)),
            layer.register_forward_hook(as_written(self._failed), always_call=True),
        ]

    def through(
        self, call: Call, report: Report, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """``outputs`` behind a tap that keeps ``inputs``."""
        apply = _Tap.apply if torch._C._are_functorch_transforms_active() else _apply
        tapped: tuple[Tensor, ...] = apply(self._anchor, call, report, len(outputs), *outputs, *inputs)
        if tapped and not recomputing():
            self.of_forward.append((weakref.ref(tapped[0].grad_fn), report, None))
        return tapped

    def start_forward(self) -> None:
        """Nothing of an earlier forward is known any more, also of one whose end nobody told of."""
        self.of_forward = []
        self.follow(False)
        for layer in self._always:  # the program may have registered hooks since
            if layer in self._following:
                layer._forward_pre_hooks.move_to_end(self._following[layer][0].id)  # type: ignore[attr-defined]
        for compiled in self._compiled:
            compiled.start_forward()

    def let_go_with(self, graph: object) -> None:
        """The forward's nodes are forgotten with ``graph``, which its outputs keep: they would keep all that it saved."""
        nodes = self.of_forward
        self._graph = weakref.ref(graph, lambda _: nodes.clear())

    def start_backward(self) -> None:
        """The program had until now to put hooks on nodes."""
        for _, _, handle in self.of_forward:
            if handle is not None:
                come_last(handle)

    def unreached(self) -> list[Report]:
        """Reports of the forward's taps that the backward which runs now will not come to. Asked once in a backward."""
        taps, self.of_forward = self.of_forward, []
        # A node that has a handle is held here, others by a weak reference: their graph may be gone.
        return [report for node, report, handle in taps if not _is_reached(node() if handle is None else node)]

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.running.append(module)

    def _failed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if output is None:
            self._left(module)

    def _left(self, module: nn.Module) -> None:
        if self.running and self.running[-1] is module:
            self.running.pop()

    def _note_made(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What a layer's forward returned, before hooks on all modules run."""
        if self.running and self.running[-1] is module:
            self._made = output, _versions((output,), {})

    def _refuse_changed(self, name: str, made: tuple[Any, list[int]], output: Any) -> None:
        self._made = None
        if made[0] is not output or made[1] != _versions((output,), {}):
            raise UnsupportedModelError(
                f"Layer '{name}': a hook on all modules (torch.nn.modules.module.register_module_forward_hook) changed "
                "its output, so what the engine would see is not the layer's own. Register it on the layer instead"
            )

    def _note_versions(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._versions[module] = _versions(args, kwargs)

    def _leave(self, name: str, everything: bool) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.running:  # before hooks of the user run
                self._left(module)
            if output is None or not torch.is_grad_enabled():
                return None
            if next(iter(module._forward_hooks)) != self._hook_ids[name]:
                raise PrivacyError(
                    f"Layer '{name}': a forward hook was put before the engine's (prepend=True), so what the engine would "
                    "see is not the layer's own output. Register it without prepend, or before make_private"
                )
            if self._made is not None:
                self._refuse_changed(name, self._made, output)
            report = self._start(name)
            given = args[0] if len(args) == 1 and not everything else None
            if type(given) is Tensor and type(output) is Tensor and output.is_floating_point() and self._is_plain(name):
                return self._on_one(name, NO_CALL, report, output, args)  # most calls, and they are many
            if everything and self._versions.pop(module) != _versions(args, kwargs):
                raise UnsupportedModelError(
                    f"Layer '{name}' ({type(module).__name__}) writes to its input in place, so what it was given is gone "
                    "when its gradient is computed; write to a copy"
                )
            call, inputs = Call.of(args, kwargs, first_only=not everything)
            return self._tapped(name, module, call, inputs, report, output)

        return hook

    def _tapped(
        self, name: str, module: nn.Module, call: Call, inputs: list[Tensor], report: Report, output: Any
    ) -> Any:
        """``output`` with a tap behind each of its floating-point tensors."""
        one_of_one = call.spec is None and type(output) is Tensor and type(inputs[0]) is Tensor
        if one_of_one and self._is_plain(name) and output.is_floating_point():
            return self._on_one(name, call, report, output, inputs)
        self._refuse_picked(name, inputs)
        are_shared = [isinstance(x, SharedValue) for x in inputs]
        leaves, spec = ([output], None) if type(output) is Tensor else tree_flatten(output)
        tapped = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        share = None
        if not any(are_shared) or any(isinstance(leaves[i], SharedValue) for i in tapped):
            share = self._share(name, inputs, [leaves[i] for i in tapped])
        if share is not None:
            are_shared = [True] * len(inputs)
            inputs = [x if isinstance(x, SharedValue) else share(x) for x in inputs]
            leaves = [share(x) if i in tapped and not isinstance(x, SharedValue) else x for i, x in enumerate(leaves)]
        outputs, inputs = unwrapped([leaves[i] for i in tapped]), unwrapped(inputs)
        if any(are_shared) and has_entries(module, inputs[0].ndim - 1):
            report = _of_entries(report)
        if call.spec is not None:
            call = dataclasses.replace(call, shared=tuple(are_shared), gives_shared=share is not None)
            if not is_proven(module, call, inputs, self._rows()):
                call = dataclasses.replace(call, outputs=tuple(x.detach().clone() for x in outputs))
        if one_of_one and share is None and len(outputs) == 1:
            return self._on_one(name, call, report, output, inputs)
        through = self.through(call, report, outputs, inputs)
        for i, x in zip(tapped, through, strict=True):
            leaf = leaves[i]
            leaves[i] = leaf.with_rows(x) if isinstance(leaf, SharedValue) else x
        return leaves[0] if spec is None else tree_unflatten(leaves, spec)

    def _on_one(self, name: str, call: Call, report: Report, output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """One output that belongs to rows, of one input that does."""
        found = None if recomputing() else node_of(output, name in self._products)
        if found is None:
            return self.through(call, report, [output], inputs)[0]
        node, made = found
        handle = node.register_prehook(NodeTap(name, inputs[0], report, self._same(output.shape), made.output_nr))
        self.of_forward.append((node, report, handle))
        return output

    def _same(self, shape: torch.Size) -> torch.Size:
        """One object for all shapes that are equal: less for the garbage collector to look at."""
        if len(self._shapes) > 1000:  # shapes that change from batch to batch
            self._shapes.clear()
        return self._shapes.setdefault(shape, shape)

    def _refuse_picked(self, name: str, inputs: Sequence[Tensor]) -> None:
        if any(map(is_picked, inputs)):
            self.picked.add(name)
        if name in self.picked and self._rows() > 1:
            raise UnsupportedModelError(f"Layer '{name}' {PICKED_REFUSED}")


def _of_entries(report: Report) -> Report:
    """What is the same for all rows, ``[B, k, ...]``, as a layer is given k entries of each row: ``[B k, ...]``."""

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flatten(0, 1)

    return lambda call, inputs, grads: report(call, tuple(map(flat, inputs)), tuple(map(flat, grads)))  # type: ignore[arg-type]


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Which change when a tensor is written to."""
    return [x._version for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, SharedValue)]


@dataclasses.dataclass(frozen=True)
class Bare:
    """A parameter outside of every layer: on a module that has children, or in a `ParameterList`."""

    name: str
    owner: nn.Module
    attribute: str


def raw_attribute(module: nn.Module, attribute: str) -> Any:
    """What a module holds under a parameter's name, shared values aside: FSDP1 puts views beside the registry."""
    return module.__dict__.get(attribute, module._parameters.get(attribute, ABSENT))


ABSENT = object()


class FreezeWindow:
    """Switches ``requires_grad`` of the managed parameters off and on; every call is idempotent."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], refusing: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._parameters = parameters
        self._refusing = refusing
        self._closed = False
        self._written: list[int] = []
        self._handles: list[RemovableHandle] = []
        self.refuse_hooks()
        self._handles = [
            p.register_hook(self._refuse(name)) for name, p in parameters.items() if p.numel() and p.requires_grad
        ]

    def close(self) -> None:
        """From here on autograd sees no trainable parameter. Raises if trainability changed since attachment."""
        changed = [n for n, p in self._parameters.items() if not p.requires_grad] if not self._closed else []
        if changed:
            raise PrivacyError(
                f"Parameter '{changed[0]}' was frozen after the engine was attached ({len(changed)} in all); call "
                "state = engine.state_dict(), engine.detach(), make_private(...) and load_state_dict(state) between "
                "logical batches, so that releases stay counted"
            )
        self._closed = True
        self._written = self._versions()
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)

    def _versions(self) -> list[int]:
        """What changes when a parameter is written to; not where that goes by its ``data``."""
        with torch._C.DisableTorchFunction():
            return [p._version for p in self._parameters.values()]

    def refuse_written(self, when: str) -> None:
        """Raises UnsupportedModelError if a parameter was written to since `close`: the noise would not cover that."""
        now = self._versions()
        if now != self._written:
            name = next(n for n, a, b in zip(self._parameters, self._written, now, strict=True) if a != b)
            raise UnsupportedModelError(
                f"Parameter '{name}' was written in {when} (a codebook that is moved, weights that are clamped), past its "
                "gradient and its noise. Do that after the step, from no row's data, or leave it out"
            )

    def refuse_hooks(self) -> None:
        """Raises UnsupportedModelError if the program put a hook on a parameter's gradient, which nobody would call."""
        ours = {handle.id for handle in self._handles}
        for name, p in self._parameters.items():
            hooks = {*(p._backward_hooks or ()), *(p._post_accumulate_grad_hooks or ())}
            if not hooks <= ours:
                raise UnsupportedModelError(
                    f"Parameter '{name}' has a hook on its gradient (register_hook, or register_post_accumulate_grad_hook), "
                    "which would not be called: autograd has no such gradient, the engine sums the rows' and adds noise. "
                    "Remove it, and change p.grad after engine.privatize() instead, before optimizer.step()"
                )

    def open(self) -> None:
        """Give the parameters back as the user knows them."""
        self._closed = False
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    def remove(self) -> None:
        self.open()
        for handle in self._handles:
            handle.remove()

    def _refuse(self, name: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            with self._refusing():
                raise UnsupportedModelError(
                    f"Parameter '{name}' received a gradient that did not pass a layer: it is used outside its layer's "
                    "forward (a weight penalty in the loss, or a functional use), so that part would escape clipping. "
                    "Use the optimizer's weight_decay, or move the use into a supported layer"
                )

        return hook


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run ``callback`` when the current backward is done (after FSDP1's own callback when queued by a tap)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]
