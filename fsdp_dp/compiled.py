"""Layers of a module that `torch.compile` compiled are recorded by probes (see `probes`), so that it stays one graph.

Where inputs like these come first the module runs as it is written, and shows which of its layers are called, how often,
and of what shapes. From the next forward on they have probes of these shapes, which the compiler guards. A layer takes
them once in a call; where it cannot it breaks the graph, as every tapped layer outside of such modules does. At the end of
a call every layer must have been recorded as often as when the module ran as it is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.probes import HANDED_OUT, Call, Form, Leave, Probes, Slot, prepare, recorded
from fsdp_dp.records import Report

_KINDS_KEPT = 100
_REASON = "fsdp_dp records what layers were given"
_BREAKS = (
    _REASON,
    "Attribute 'taken'",
)  # what the compiler says of a layer that breaks a graph; in a checkpoint: `Slot`


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` leaves ``function`` out of its graphs, where it would run once, or keep buffers that are reused."""
    return torch.compiler.disable(function, reason=_REASON)  # type: ignore[no-any-return]


@dataclasses.dataclass
class Habits:
    """How a module calls its layers, for inputs of one kind.

    Attributes:
        forms: of those that probes will do for.
        calls: how often each is called.
    """

    forms: dict[str, Form]
    calls: Counter[str]


class CompiledModule:
    """A module that `torch.compile` compiled, with layers that are tapped.

    Args:
        name, module: itself.
        start: as `Taps` is given it.
        is_plain: whether a layer's calls are known to be of rows alone.
        is_watched: whether this forward runs as it is written, to be looked at.
        recomputing: whether this call is one of activation checkpointing, in backward.
        append: told of the node in front of a call, and what to do if backward does not come to it.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        start: Callable[[str], Report],
        is_plain: Callable[[str], bool],
        is_watched: Callable[[], bool],
        recomputing: Callable[[], bool],
        append: Callable[[Any], None],
    ) -> None:
        prepare()
        self._name, self.module = name, module
        self._layers: dict[str, tuple[nn.Module, Slot]] = {}
        self._start, self._is_plain, self._is_watched = start, is_plain, is_watched
        self._recomputing, self._append = recomputing, append
        self._before = vars(module).get("_compiled_call_impl")
        self._inner: Callable[..., Any] = self._before or module._call_impl
        self._anchor = torch.zeros((), requires_grad=True)
        self._known: dict[Hashable, Habits] = {}
        self._learned: dict[Hashable, Habits] = {}
        self._now: Call | None = None
        self._call_impl = as_written(self._call)
        vars(module)["_compiled_call_impl"] = self._call_impl

    def hook(self, name: str, layer: nn.Module, leave: Leave, *, everything: bool) -> Leave:
        """The forward hook of a layer in it, which calls ``leave``, or takes probes if that needs the first input alone."""

        def noted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            tapped = leave(module, args, kwargs, output)
            if self._now is not None and torch.is_grad_enabled():
                self._now.tapped[name] += 1
                self._now.seen[name] = None if everything else Form.of(args, kwargs, output)
            return tapped

        slot = layer.__dict__["_fsdp_dp_slot"] = Slot(as_written(noted))
        self._layers[name] = layer, slot
        return recorded

    def hooked(self, name: str, handle: RemovableHandle) -> None:
        if name in self._layers:
            self._layers[name][1].hook_id = handle.id

    def remove(self) -> None:
        for layer, _ in self._layers.values():
            del layer.__dict__["_fsdp_dp_slot"]
        if vars(self.module).get("_compiled_call_impl") is self._call_impl:
            del vars(self.module)["_compiled_call_impl"]
            if self._before is not None:
                vars(self.module)["_compiled_call_impl"] = self._before

    def start_forward(self) -> None:
        """What the last forward showed is used from now on: not within it, whose recomputation makes the same graphs."""
        if self._learned:
            if len(self._known) + len(self._learned) > _KINDS_KEPT:
                self._known.clear()
            self._known.update(self._learned)
            self._learned = {}

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._now is not None or not torch.is_grad_enabled():
            return self._run(args, kwargs)
        call = Call((self.module.training, *_kind(args, kwargs)))
        node = self._hand_out(call)
        self._now = call
        try:
            with contextlib.nullcontext() if call.kind in self._known else torch.compiler.set_stance("force_eager"):
                output = self._run(args, kwargs)
            taken = [name for name in call.forms if self._layers[name][1].taken]
        finally:
            self._now = None
            if call.forms:
                HANDED_OUT.probes = []
            for name in call.forms:
                slot = self._layers[name][1]
                slot.number, slot.taken = -1, False
        if not self._recomputing():
            self._check(call, taken)
            call.reports = {name: self._start(name) for name in taken}
            if taken:
                self._append((weakref.ref(node), call.not_reached, None))
        return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._inner(*args, **kwargs)
        except RuntimeError as error:
            if not any(reason in str(error) for reason in _BREAKS):
                raise
            known = self._known.get(self._now.kind) if self._now is not None else None
            breaking = [name for name in known.calls if name not in known.forms] if known is not None else []
            raise UnsupportedModelError(
                f"The compiled module '{self._name}' may not be broken up (fullgraph=True), but has to be where a layer is "
                "given ids, is called twice or by keyword, has no rule, or is in a checkpoint within the module "
                f"(found: {', '.join(breaking[:4]) or 'a checkpoint'}). Compile it without fullgraph, or leave it uncompiled"
            ) from error

    def _hand_out(self, call: Call) -> Any:
        known = self._known.get(call.kind)
        if known is None or HANDED_OUT.probes:  # or a compiled module that is no part of this one calls it
            return None
        call.forms = {name: form for name, form in known.forms.items() if self._can_take(name)}
        if not call.forms:
            return None
        if self._recomputing():
            for name in call.forms:
                self._start(name)  # refuses what cannot be recorded so
        HANDED_OUT.probes = list(Probes.apply(self._anchor, call))
        for number, name in enumerate(call.forms):
            self._layers[name][1].number = number
        return HANDED_OUT.probes[0].grad_fn

    def _can_take(self, name: str) -> bool:
        layer, slot = self._layers[name]  # a hook before it would be refused by `leave`
        return self._is_plain(name) and next(iter(layer._forward_hooks), None) == slot.hook_id

    def _check(self, call: Call, taken: Iterable[str]) -> None:
        """Raises UnsupportedModelError if a layer was not recorded as often as when the module ran as it is written."""
        calls = call.tapped + Counter(taken)
        known = self._known.get(call.kind)
        if self._is_watched() or known is None:  # it ran as it is written
            forms = {n: form for n, form in call.seen.items() if form is not None and calls[n] == 1}
            self._learned[call.kind] = Habits(forms, calls)
            return
        missing = {name for name in known.calls | calls if known.calls[name] != calls[name]}
        if missing:
            name = min(missing)
            raise UnsupportedModelError(
                f"Layer '{name}' was recorded {calls[name]} times in a call of the compiled module '{self._name}', and not "
                "as often when that ran as it is written, so a part of its gradient may be lost. Leave it uncompiled if "
                "anything but its mode and the shapes of its inputs decides which layers it calls"
            )


def _kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, ...]:
    """Of inputs: calls of one kind make tensors of the same shapes."""
    leaves = args if not kwargs and all(type(x) is Tensor for x in args) else tree_leaves((args, kwargs))
    device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return autocast, *((x.shape, x.dtype) for x in leaves if isinstance(x, Tensor))


def refuse_cuda_graphs(root: nn.Module) -> None:
    """A replay writes where the one before it wrote, which may be what the engine recorded: not tried, so not done."""
    for name, module in root.named_modules():
        if _replays(module) and _is_on_gpu(module):
            what = f"Module '{name}'" if name else "The model"
            raise UnsupportedModelError(
                f"{what} is compiled with CUDA graphs (mode='reduce-overhead', "
                "mode='max-autotune' or triton.cudagraphs), whose replays overwrite what was recorded. Compile it with "
                "mode='max-autotune-no-cudagraphs', or without a mode"
            )


def _replays(module: nn.Module) -> bool:
    compiled = vars(module).get("_compiled_call_impl") or vars(module).get("dynamo_ctx")
    config = getattr(compiled, "get_compiler_config", lambda: getattr(compiled, "compiler_config", None))()
    return bool((config or {}).get("triton.cudagraphs"))


def _is_on_gpu(module: nn.Module) -> bool:
    return any(p.device.type == "cuda" for p in module.parameters())


def compiled_modules(root: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """The outermost compiled modules in ``root``, and their names; no layer, and not the root, which the engine hooks on."""
    layers, optimized = set(layers), sys.modules.get("torch._dynamo.eval_frame")
    found: dict[nn.Module, str] = {}
    inner: set[nn.Module] = set()
    for name, module in root.named_modules():
        is_compiled = optimized is not None and isinstance(module, optimized.OptimizedModule)
        is_compiled |= vars(module).get("_compiled_call_impl") is not None
        if is_compiled and module is not root and module not in inner and module not in layers:
            found[module] = name
            inner.update(module.modules())
    return found
