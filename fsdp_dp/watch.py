"""What only running the model shows: parameters used behind their layer's back, buffers written from data (rule 9), and
losses inside the model that average over all labels of the batch (rule 8).

They are looked for in the first training forward, and refused: a parameter that is used outside its own layer would lose
that part of its gradient, a buffer that a forward changes carries un-noised data into checkpoints, and where the number of
labels divides the loss, one row changes the gradients of others (in a later microbatch, if not in the first).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.label_watch import LOSSES, averaged_labels
from fsdp_dp.marks import BY_PYTHON, draws_outside, forget, mark, mark_rows, marks_of, reads_rows
from fsdp_dp.module_tree import ModuleTree
from fsdp_dp.parts import Part
from fsdp_dp.sharding.base import canonical_name
from fsdp_dp.shared_values import METADATA, SharedValue, function_name, refuse_setting, sets_requires_grad
from fsdp_dp.taps import raw_attribute

_TORCH, _OURS = (os.path.join(os.path.dirname(file), "") for file in (torch.__file__, __file__))
Site = tuple[nn.Module, str]

_TRAINABILITY = frozenset({"requires_grad", "requires_grad_", "__set__"})
_CONVERSIONS = frozenset("to type float double half bfloat16 contiguous type_as".split())
_WRITING = frozenset("__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__ __set__".split())


class FirstForward(TorchFunctionMode):
    """Active during the first training forward of the root; `verify` is called at its end.

    It also marks what descends from ``inputs``, the rows' data (see `shared_values`).

    Args:
        sites: (module, attribute) -> canonical name, for every managed parameter.
        running: the stack of layers whose forward is running now.
        rows: of the microbatch.
    """

    def __init__(
        self, root: nn.Module, sites: Mapping[Site, str], running: Sequence[nn.Module], inputs: Any = (), rows: int = 1
    ) -> None:
        super().__init__()
        for tensor in _tensors((inputs,), {}):
            forget(tensor)
            if rows == 1 or tensor.shape[:1] != (1,):  # positions [1, T] are the same for all rows
                mark_rows(tensor)
        self._root, self._sites, self._running, self._rows = root, sites, running, rows
        self._shapes: set[tuple[int, ...]] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._frozen: dict[Site, str] = {}
        self._operators, self._functions = _Operators(self), _Functions(self)
        self.settled, self._rows_were_read = True, False
        self._random_state: Any = None

    def __enter__(self) -> FirstForward:
        self._buffers = {name: buffer.detach().clone() for name, buffer in self._root.named_buffers()}
        self._frozen = {
            (module, attribute): canonical_name(f"{name}.{attribute}".lstrip("."))
            for name, module in self._root.named_modules()
            for attribute, p in module._parameters.items()
            if p is not None and (module, attribute) not in self._sites
        }
        self._random_state = draws_outside()
        self._operators.__enter__()
        self._functions.start()
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.stop()
        self._operators.__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function_name(func) in _TRAINABILITY and args:
            wanted = sets_requires_grad(func, function_name(func), args[1:], kwargs)
            if wanted is not None or function_name(func) == "requires_grad":
                self._check_trainability(args[0], wanted)
                return func(*args, **kwargs)
        if function_name(func) in METADATA or _sets_itself(function_name(func), args):
            return func(*args, **kwargs)
        tensors = list(_tensors(args, kwargs))
        if function_name(func) in _CONVERSIONS and (unchanged := _nothing_to_do(func, args, kwargs)) is not None:
            return unchanged
        self.check_uses(tensors, function_name(func))
        self._check_write(function_name(func), args, kwargs)
        result = func(*args, **kwargs)
        if func in LOSSES and result.requires_grad:
            labels = averaged_labels(args, kwargs, self._rows)
            if labels is not None and labels.numel() > self._rows:  # a row may have several, or none
                result.register_hook(_refuse_average)  # in backward, since the program may have a loss of its own
        self._rows_were_read |= reads_rows(function_name(func), tensors)
        by_python = self._rows_were_read or (function_name(func) in BY_PYTHON and self._random_state != draws_outside())
        marks = marks_of(function_name(func), args, kwargs, tensors, by_python=by_python)
        for tensor in _tensors((result,), {}) if marks else ():
            mark(tensor, marks)
        return result

    def check_uses(self, tensors: Iterable[Tensor], func: str) -> None:
        """Raises UnsupportedModelError if a parameter is used that is not of the layer which runs now."""
        for tensor in tensors:
            if not (tensor.requires_grad or isinstance(tensor, SharedValue)):  # the window is closed
                self._check_use(tensor, func)

    def _check_use(self, tensor: Tensor, func: str) -> None:
        owners = self._owners(tensor)
        running = self._running[-1] if self._running else None
        running = running.owner if isinstance(running, Part) else running
        if not owners or any(module is running for module, _ in owners):
            return
        if _called_from_torch_distributed():
            return
        raise UnsupportedModelError(
            f"Parameter '{owners[0][1]}' is used by {func} outside its own layer's forward, so that part of "
            "its gradient would escape clipping. Call the layer itself, or wrap this use in a supported layer"
        )

    def _owners(self, tensor: Tensor) -> list[tuple[nn.Module, str]]:
        """Where a tensor is a managed parameter now: the module, and the parameter's canonical name."""
        return [(module, name) for (module, attribute), name in self._sites.items() if _is(module, attribute, tensor)]

    def _check_trainability(self, tensor: Tensor, wanted: bool | None) -> None:
        """Raises UnsupportedModelError if the program sets ``requires_grad`` of a parameter, or asks for it: it is off."""
        if isinstance(tensor, SharedValue):  # which knows itself
            return
        if _asked_by((_OURS,) if wanted is not None else (_OURS, _TORCH)):  # torch's modules set it for the program
            return
        owners = self._owners(tensor)
        if not owners or _called_from_torch_distributed():
            return
        if wanted is not None:
            refuse_setting(owners[0][1], wanted)
        raise UnsupportedModelError(
            f"The program asks in forward whether parameter '{owners[0][1]}' requires a gradient, which is False there while "
            "the engine is attached, so it would go another way than without privacy. Ask in __init__, and keep the answer"
        )

    def _check_write(self, func: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises UnsupportedModelError if a parameter is written, by its ``data``: the noise would not cover that."""
        if func == "__set__" and self._is_moved(*args):
            return
        writes = (func.endswith("_") and not func.endswith("__")) or func in _WRITING
        written = [kwargs.get("out"), *(args[:1] if writes else ())]
        self.check_written(written, func)

    def _is_moved(self, parameter: Any, data: Any = None) -> bool:
        """Whether a frozen parameter's ``data`` is set to what it says already, as offloading and quantized layers do."""
        frozen = any(_is(module, attribute, parameter) for module, attribute in self._frozen)
        if not frozen or not isinstance(data, Tensor) or _called_from_torch_distributed():
            return False
        with torch._C.DisableTorchFunction():
            same = parameter.shape == data.shape and parameter.dtype == data.dtype
            return same and torch.equal(parameter.detach(), data.detach().to(parameter.device))

    def check_written(self, written: Iterable[Any], func: str) -> None:
        """Raises UnsupportedModelError if one of these tensors is a parameter, or has its memory."""
        tensors = [x.unread if isinstance(x, SharedValue) else x for x in written if isinstance(x, Tensor)]
        memory = {_memory(x) for x in tensors if x is not None} - {None, 0}
        if not memory or _called_from_torch_distributed():
            return
        for (module, attribute), name in self._sites.items():
            parameter = raw_attribute(module, attribute)
            if isinstance(parameter, Tensor) and _memory(parameter) in memory:
                raise UnsupportedModelError(
                    f"Parameter '{name}' is written by {func} in forward (a codebook that is moved, weights that are "
                    "clamped), past its gradient and its noise. Do that after the step, from no row's data, or leave it out"
                )
        for (module, attribute), name in self._frozen.items():
            parameter = raw_attribute(module, attribute)
            if isinstance(parameter, Tensor) and _memory(parameter) in memory:
                raise UnsupportedModelError(
                    f"Frozen parameter '{name}' is written by {func} in forward. It would carry un-noised statistics of the "
                    "data into checkpoints (a codebook, a centre, a running mean): do that after the step, from no row's "
                    "data, or leave it out"
                )

    def verify(self) -> None:
        """Raises UnsupportedModelError if the forward used a parameter unseen by functions, or changed a buffer."""
        if self._operators.problem is not None:
            raise self._operators.problem
        for name, buffer in self._root.named_buffers():
            before = self._buffers.get(name)
            if before is None or before.shape != buffer.shape:
                self.settled = False  # made, or resized, just now: a cache will stay as it is, a statistic will not
                continue
            if not torch.equal(torch.nan_to_num(before.to(buffer.device, buffer.dtype)), torch.nan_to_num(buffer)):
                raise UnsupportedModelError(
                    f"Buffer '{name}' was changed by a training forward. It would carry un-noised statistics of the "
                    "data into checkpoints (running statistics, codebooks, load-balance counters): use a layer without "
                    "it, or put that module into eval mode"
                )


class _Operators(TorchDispatchMode):
    """Uses that no Python function makes: inside of what `torch.jit` compiled, and of operators written in C++.

    The first ``problem`` is kept, since TorchScript would make another error of it.
    """

    def __init__(self, watch: FirstForward) -> None:
        super().__init__()
        self._watch = watch
        self.problem: UnsupportedModelError | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_engine = not torch._C._is_torch_function_enabled()  # which may look at a parameter
        if self.problem is None and not by_engine:
            try:
                self._watch.check_uses(_tensors(args, kwargs or {}), str(func))
            except UnsupportedModelError as problem:
                self.problem = problem
            try:
                self._watch.check_written(_written(func, args, kwargs or {}), str(func))
            except UnsupportedModelError as problem:
                self.problem = problem
                raise
        with torch._C.DisableTorchFunction():  # a shared value in here is for its own dispatch to refuse
            return func(*args, **(kwargs or {}))


class _Functions:
    """What a `torch.autograd.Function` is given, which no mode hears of: its backward may return a gradient for it."""

    def __init__(self, watch: FirstForward) -> None:
        self._watch = watch
        self._apply: Any = None

    def start(self) -> None:
        original = self._apply = vars(torch.autograd.Function)["apply"]

        def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():  # asking is no use of theirs
                self._watch.check_uses(_tensors(args, kwargs), function.__name__)
            return original.__func__(function, *args, **kwargs)

        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]

    def stop(self) -> None:
        if self._apply is not None:
            torch.autograd.Function.apply = self._apply  # type: ignore[method-assign]
        self._apply = None


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    known = getattr(func, "_schema", None)
    if known is None or not known.is_mutable:
        return []
    given = dict(zip((a.name for a in known.arguments), args, strict=False)) | kwargs
    written = [given.get(a.name) for a in known.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tree_leaves(written)


class Uncompiled:
    """While on, what `torch.compile` has compiled runs as it was written: nobody sees what happens inside a graph.

    From a watched forward to the end of its backward, so that activation checkpointing runs again what it ran before.
    """

    def __init__(self) -> None:
        self._stance: AbstractContextManager[None] | None = None

    def start(self) -> None:
        if self._stance is None:
            self._stance = torch.compiler.set_stance("force_eager")

    def stop(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
        self._stance = None


_CONSTANT_DIVISOR = (
    "Give the model a constant num_items_in_batch (a Python number, with loss_reduction='sum'), or take "
    "fsdp_dp.per_sample_cross_entropy(logits, labels).mean() as the loss (of a causal language model, which shifts its "
    "labels, with logits[:, :-1] and labels[:, 1:])"
)


def _refuse_average(grad: Tensor) -> None:
    raise UnsupportedModelError(
        "The model computes its loss as a mean over all labels of the batch, which couples rows: how many labels one row has "
        f"changes the gradients of others. {_CONSTANT_DIVISOR}"
    )


class ConstantDivisor:
    """``num_items_in_batch``, by which Hugging Face models divide a sum over labels, must not be counted from the data."""

    def __init__(self) -> None:
        self._seen: tuple[Any] | None = None

    def check(self, kwargs: Mapping[str, Any]) -> None:
        """Raises PrivacyError if the number is a tensor, as it is where it was counted, or not that of the last forward."""
        items = kwargs.get("num_items_in_batch")
        if isinstance(items, Tensor) or self._seen not in (None, (items,)):
            before = "" if self._seen is None else f" after {self._seen[0]!r}"
            raise PrivacyError(
                f"num_items_in_batch={items!r}{before}: a number that is counted from the batch divides the loss, so one row "
                f"changes the gradients of others. {_CONSTANT_DIVISOR}"
            )
        self._seen = (items,)


def buffer_versions(tree: ModuleTree) -> list[tuple[int, int]]:
    """What changes when a buffer is written or replaced; reads no data."""
    buffers = (buffer for module in tree.modules() for buffer in module._buffers.values() if buffer is not None)
    return [(id(buffer), buffer._version) for buffer in buffers]


def _nothing_to_do(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A parameter that is converted to the type that it has: the same tensor, so no use of it."""
    if not args or not isinstance(args[0], nn.Parameter) or isinstance(args[0], SharedValue):
        return None
    with torch._C.DisableTorchFunction():
        result = func(*args, **kwargs)
    return result if result is args[0] else None


def _sets_itself(func: str, args: tuple[Any, ...]) -> bool:
    """What `nn.Module.to` does with a parameter that need not be converted."""
    return func == "__set__" and len(args) == 2 and args[0] is args[1]


def _memory(x: Tensor) -> int | None:
    try:
        with torch._C.DisableTorchFunction():
            return x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None


def _is(module: nn.Module, attribute: str, tensor: Tensor) -> bool:
    return raw_attribute(module, attribute) is tensor


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    yield from (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def _asked_by(folders: tuple[str, ...]) -> bool:
    """Whether code in one of these folders called the function of torch that the mode heard of."""
    asker = sys._getframe(3)  # of this function's caller, and of `__torch_function__`
    return asker.f_code.co_filename.startswith(folders)


def _called_from_torch_distributed() -> bool:
    """FSDP moves parameters around inside the forward; that is no use of them. What a module does inside FSDP1's own is."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if "/torch/distributed/" in file:
            return True
        if file.endswith("/torch/nn/modules/module.py"):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False
