"""Values that all rows of a microbatch share, carried once a row, so that autograd finds each row's gradient by itself.

A class token, a position table, a layer scale: a bare parameter meets the rows' data by broadcasting, and autograd would
add its gradient up over rows. A `SharedValue` looks like the parameter (shape ``[*shape]``) and holds ``per_row``
``[B, *shape]``, at first a view that takes no memory. What the program computes from shared values alone is computed for
every row (`torch.func.vmap`) and is shared again; where a shared value meets the rows' data, ``per_row`` is lined up with
them and the result is an ordinary tensor. The gradient that arrives at ``per_row`` is ``[B, *shape]``: of each row its own.

The same carries the output of a layer whose input is the same for all rows (position ids ``[T]`` or ``[1, T]``).

What is row data is known in the first forward, where everything that descends from the model's inputs is marked
(see `marks`); later, tensors that require grad are, and for the others the first forward's answer is kept (see
`Meetings`). All of it is verified before the first release, by exchanging rows (see `independence`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fsdp_dp.by_row import by_row
from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.marks import PICKED_REFUSED, is_marked, is_picked
from fsdp_dp.records import layout_of
from fsdp_dp.row_layouts import RowLayouts

METADATA = frozenset(
    "shape dtype device layout ndim is_leaf grad grad_fn is_cuda is_cpu is_meta is_sparse is_quantized "
    "is_mkldnn is_nested is_xla is_mps names _base itemsize nbytes _version output_nr size dim numel nelement stride "
    "element_size is_floating_point is_complex is_contiguous data_ptr untyped_storage storage_offset __len__ __hash__ "
    "__repr__ __format__ get_device requires_grad is_inference _backward_hooks __deepcopy__ is_tensor is_storage "
    "is_signed dim_order ndimension _has_compatible_shallow_copy_type".split()
)
"""Names of what a tensor can be asked without using its values."""

_READS = frozenset("data item tolist numpy __bool__ __float__ __int__ __index__ equal allclose __array__".split())
_ELEMENTWISE = frozenset(
    "add sub subtract rsub mul multiply div divide true_divide floor_divide pow maximum minimum fmax fmin where lerp "
    "addcmul addcdiv atan2 eq ne lt le gt ge masked_fill clamp logical_and logical_or logaddexp hypot remainder fmod "
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __pow__ __rpow__ "
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __mod__ "
    "add_ sub_ mul_ div_ masked_fill_ __iadd__ __isub__ __imul__ __itruediv__ __idiv__".split()
)
_WRITING = frozenset(
    "__iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__ add_ sub_ mul_ div_ pow_ clamp_ clamp_min_ clamp_max_ relu_ "
    "sigmoid_ tanh_ exp_ log_ sqrt_ rsqrt_ square_ abs_ neg_ masked_fill_ fill_ zero_ copy_".split()
)
"""Whose first argument keeps its shape."""
_ACTIVATIONS = frozenset("relu relu6 elu selu celu leaky_relu rrelu silu hardswish hardtanh mish threshold".split())
_JOINING = frozenset({"cat", "concat", "concatenate", "stack"})
_ROWWISE = frozenset(
    "linear matmul __matmul__ __rmatmul__ bmm embedding layer_norm group_norm rms_norm prelu bilinear "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cdist".split()
)
_OF_ROWS = frozenset({"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "cdist"})
"""Of values that the program expanded to the rows."""
_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm"})
_KEEPS_SHAPE = frozenset("to type type_as float half bfloat16 double clone contiguous detach __neg__ neg".split())
_EXPANDING = frozenset({"expand", "expand_as", "broadcast_to", "repeat"})


@dataclasses.dataclass
class Meetings:
    """For each place where a shared value meets another tensor that needs no gradient: is that one the rows' data?

    Filled while ``learning`` (a watched forward, whose tensors are marked), looked up afterwards. "No" is exact whatever
    the tensor is: each row's copy then meets all of it, and where the result meets the rows, row i is that of copy i. It is
    the answer where nothing else is known (a mask that the first microbatch did not need), or where answers differ; it
    takes memory for ``rows`` results, so the next forward ``wants`` to be watched.
    """

    layouts: RowLayouts = dataclasses.field(default_factory=RowLayouts)
    rows: int = 0
    learning: bool = True
    wants: bool = False
    is_part: Callable[[str, Tensor], bool] = lambda owner, x: False
    """Whether what the program reads as a parameter is this rank's part of it."""
    is_of_model: Callable[[nn.Module], bool] = lambda module: False
    """Other modules may be made in forward (a slice of a ParameterList)."""
    _known: dict[tuple[Any, ...], bool] = dataclasses.field(default_factory=dict)
    _picked: set[str] = dataclasses.field(default_factory=set)

    def start(self, rows: int, *, learning: bool) -> None:
        """Of a forward."""
        self.rows, self.learning = rows, learning
        self.wants = self.wants and not learning

    def is_row_data(self, x: Tensor, place: tuple[Any, ...]) -> bool:
        place = (*place, x.ndim)
        if self.learning and layout_of([x.shape], self.rows) is not None:
            self._known[place] = (x.requires_grad or is_marked(x)) and self._known.get(place, True)
        if x.requires_grad:
            return True
        if layout_of([x.shape], self.rows) is None:
            return False
        self.wants |= place not in self._known
        return self._known.get(place, False)

    def refuse_sharded(self, x: Tensor, owner: str) -> None:
        """Raises UnsupportedModelError if what the program reads is this rank's part of a parameter."""
        if self.is_part(owner, x):
            raise UnsupportedModelError(
                f"Parameter '{owner}', read outside of a layer's own forward, is sharded there: its FSDP unit does not run, "
                "or tensor parallelism splits it. Read it inside of its unit, or after the unit's forward with "
                "reshard_after_forward=False, or move that use into a layer of its own"
            )

    def refuse_picked(self, row_data: Sequence[Tensor], owner: str) -> None:
        """Raises UnsupportedModelError if the parameter meets, or met in a watched forward, entries picked from all rows."""
        if any(map(is_picked, row_data)):
            self._picked.add(owner)
        if row_data and owner in self._picked and self.rows > 1:
            raise UnsupportedModelError(f"Parameter '{owner}' {PICKED_REFUSED}")


class SharedValue(Tensor):
    """A tensor that is the same for all rows; see the module's text.

    Attributes:
        per_row: ``[B, *shape]``.
        owner: the parameter or layer that it comes from, for messages.
        meetings: what is known of the tensors that it meets.
        expanded: ``[B, *shape[1:]]`` where the program expanded it to the rows: then ``per_row[i, j] = expanded[i]``.
        viewed: whether another one has, or had, the same memory.
        torn: whether another one that has the same memory in the program's eyes has its own here.
    """

    owner: str
    meetings: Meetings
    expanded: Tensor | None
    viewed: bool
    torn: bool
    _is_param: bool = False
    """Where it is a parameter, for ``isinstance(x, nn.Parameter)``."""
    _per_row: Tensor | Callable[[], Tensor]
    _source: Tensor

    @staticmethod
    def __new__(cls, per_row: Tensor, owner: str, meetings: Meetings, expanded: Tensor | None = None) -> SharedValue:
        return cls._like(per_row, per_row.shape[1:], per_row, owner, meetings, expanded)

    def __init__(self, *args: Any) -> None: ...

    @classmethod
    def later(cls, x: Tensor, first_used: Callable[[], Tensor], owner: str, meetings: Meetings) -> SharedValue:
        """The parameter ``x`` as a shared value, whose rows ``first_used`` gives when they are asked for, if they are.

        Where no gradient is recorded it is a constant, and they need not be.
        """
        self = cls._like(x, x.shape, first_used, owner, meetings, None)
        with torch._C.DisableTorchFunction():  # no use of the parameter that the watch should look at
            self._source = x.detach()
        self._is_param = True
        return self

    @classmethod
    def _like(
        cls, x: Tensor, shape: torch.Size, per_row: Tensor | Callable[[], Tensor], owner: str, meetings: Meetings,
        expanded: Tensor | None,
    ) -> SharedValue:  # fmt: skip
        trained = per_row.requires_grad if isinstance(per_row, Tensor) else True
        trained = trained and not torch.compiler.is_dynamo_compiling()  # which will refuse it, and has no such hooks
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=x.dtype, device=x.device, requires_grad=trained
        )
        if trained:
            with torch._C.DisableTorchFunction():
                self.register_hook(functools.partial(_refuse_gradient, owner, tuple(shape)))
        self._per_row, self.owner, self.meetings, self.expanded = per_row, owner, meetings, expanded
        self.viewed = self.torn = False
        return self  # type: ignore[no-any-return]

    def replace(self, per_row: Tensor) -> None:
        """The same values, in memory of their own."""
        self._per_row = per_row

    @property
    def unread(self) -> Tensor | None:
        """The parameter, where nobody has asked for its rows."""
        return None if isinstance(self._per_row, Tensor) else self._source

    @property
    def per_row(self) -> Tensor:
        if not isinstance(self._per_row, Tensor):
            if torch._C._are_functorch_transforms_active():
                raise _unsupported(self, "a transform of torch.func")
            self._per_row = self._per_row()
        return self._per_row

    def with_rows(self, per_row: Tensor) -> SharedValue:
        """The same value, behind something in the graph."""
        return SharedValue(per_row, self.owner, self.meetings)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"SharedValue({self.owner}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name == "grad_fn" and (module := _registering()) is not None and args[0].meetings.is_of_model(module):
            refuse_assignment(args[0].owner)
        if name in ("requires_grad", "register_hook") and (asking := _asked_by_sharding()):
            if _BEFORE_BACKWARD.isdisjoint(asking):
                return False  # FSDP looks for inputs with nodes of their own, to hear when backward has come to them
            with torch._C.DisableTorchFunction():  # it gathers a unit's parameters when backward comes to an output
                return func(args[0].per_row, *args[1:], **kwargs)
        if name in METADATA and func is not torch.autograd.grad:
            return super().__torch_function__(func, types, args, kwargs)
        if name in _SETTERS and isinstance(args[0], SharedValue):
            return args[0]._set(func, name, args[1:], kwargs)
        if name in _HOOKS and isinstance(args[0], SharedValue):
            raise _unsupported(args[0], f"{name}: its hooks, which are given no gradient of all rows,")
        if not torch.is_grad_enabled():
            unread = [x for x in tree_leaves((args, kwargs)) if isinstance(x, SharedValue) and x.unread is not None]
            if inside_custom_function():
                shared = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, SharedValue))
                raise _unsupported(shared, "a torch.autograd.Function")
            if unread:
                return _as_constants(func, unread, args, kwargs)
        return _Use(func, name, args, kwargs).result()

    def _set(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SharedValue:
        """An attribute of the program's tensor, which has no other effect than on ``requires_grad``."""
        wanted = sets_requires_grad(func, name, args, kwargs)
        if wanted is None:
            raise _unsupported(self, "an assignment to an attribute of it")
        # What the program made out of a parameter is its own: it may want the gradient of that.
        made = wanted and not self._is_param
        if wanted != self.requires_grad and not made:
            refuse_setting(self.owner, wanted)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        shared = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, SharedValue))
        raise _unsupported(shared, str(func))


def _as_constants(
    func: Callable[..., Any], unread: Sequence[SharedValue], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A function on parameters where no gradient is recorded. What gives a parameter as it is gives it for later, too."""
    for x in unread:
        x.meetings.refuse_sharded(x._source, x.owner)
    constants = {id(x): x.unread for x in unread}
    back = {id(x.unread): x for x in unread}
    args, kwargs = tree_map(lambda x: constants.get(id(x), x), (args, kwargs))
    return tree_map(lambda x: back.get(id(x), x), func(*args, **kwargs))


def _memory(x: Tensor) -> int | None:
    try:
        return x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # inside torch.func's transforms
        return None


def function_name(func: Callable[..., Any]) -> str:
    """The name of a torch function, that of a property for its getter."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def unwrapped(tree: Any) -> Any:
    """``per_row`` in place of every shared value."""
    return tree_map(lambda x: x.per_row if isinstance(x, SharedValue) else x, tree)


def inside_custom_function() -> bool:
    """Whether a `torch.autograd.Function` of the program runs forward, from which no gradient comes back to a row's value."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "apply" and frame.f_code.co_filename.endswith("torch/autograd/function.py"):
            return True
        frame = frame.f_back
    return False


def _asked_by_sharding() -> list[str]:
    """The functions of torch's FSDP that ask, perhaps by way of a mode of the engine's; none if the program does."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    asking = []
    while frame is not None and frame.f_code.co_filename.startswith(_SHARDING):
        asking.append(frame.f_code.co_name)
        frame = frame.f_back
    return asking


_OURS = os.path.join(os.path.dirname(__file__), "")
_SHARDING = os.path.join(os.path.dirname(torch.__file__), "distributed", "")
_BETWEEN = (_OURS, torch._tensor.__file__, torch.overrides.__file__)
_BEFORE_BACKWARD = frozenset({"_register_pre_backward_hook", "_register_pre_backward_hooks"})
_SETTERS = frozenset({"requires_grad_", "__set__"})
_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})


def sets_requires_grad(
    func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool | None:
    """What a method that is given ``args`` sets a tensor's ``requires_grad`` to; None if it is another method."""
    if name == "requires_grad_":
        return bool(args[0] if args else kwargs.get("requires_grad", True))
    return bool(args[0]) if func == Tensor.requires_grad.__set__ else None  # type: ignore[attr-defined]


def refuse_setting(owner: str, wanted: bool) -> NoReturn:
    raise UnsupportedModelError(
        f"requires_grad of parameter '{owner}' is set to {wanted} in forward, where the engine takes its gradient from the "
        "rows whatever is set. Use weight.detach() where a gradient is not wanted; to freeze a parameter, do it between "
        "logical batches: state = engine.state_dict(), engine.detach(), freeze, make_private(...) and load_state_dict(state)"
    )


def _registering() -> nn.Module | None:
    """The module whose `register_parameter` asks, or a mode that heard of that; None if it is another's question."""
    for frame in (sys._getframe(2), sys._getframe(3)):
        if frame.f_code is nn.Module.register_parameter.__code__:
            return frame.f_locals["self"]  # type: ignore[no-any-return]
    return None


def refuse_assignment(owner: str) -> NoReturn:
    raise UnsupportedModelError(
        f"Parameter '{owner}' is assigned to a module in forward, which would give the model another parameter as it runs; "
        "tie weights in __init__, before make_private"
    )


def _refuse_gradient(owner: str, shape: tuple[int, ...], grad: Tensor | None) -> None:
    """A shared value itself is in no graph, but for a `torch.autograd.Function` that was given it as an argument."""
    if grad is not None:
        raise _unknown(owner, shape, "a torch.autograd.Function that returns a gradient for it")


_MORE = {"_grouped_mm": "; for Hugging Face mixtures of experts, set experts_implementation='batched_mm' in the config"}


def _unsupported(shared: SharedValue, name: str) -> UnsupportedModelError:
    return _unknown(shared.owner, tuple(shared.shape), name)


def _unknown(owner: str, shape: tuple[int, ...], name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Parameter '{owner}' is used by {name} in a way whose per-row gradient is not known (shape {shape}); wrap that use "
        "in a module of its own, without children, that is given the rows' data and owns the parameter"
        + _MORE.get(name, "")
    )


class _Use:
    """One call of a torch function on shared values and others."""

    def __init__(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.name = func, name
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.shared = [x for x in self.leaves if isinstance(x, SharedValue)]
        self.first = self.shared[0]
        self.meetings = self.first.meetings
        self.rows = self.meetings.rows
        self.owner = self.first.owner
        self.row_data = [
            x for x in self.leaves
            if isinstance(x, Tensor) and not isinstance(x, SharedValue) and name not in ("expand_as", "type_as")
            and self.meetings.is_row_data(x, (name, self.owner, self.first.ndim))
        ]  # fmt: skip
        self.meetings.refuse_picked(self.row_data, self.owner)

    def call(self, replace: Callable[[Any], Any]) -> Any:
        args, kwargs = tree_unflatten([replace(x) for x in self.leaves], self.spec)
        return self.func(*args, **kwargs)

    def result(self) -> Any:
        if self.name == "embedding":
            self._look_at_table()
        if self.name in _READS:
            return self.call(lambda x: x.per_row[0].detach() if isinstance(x, SharedValue) else x)
        if self.row_data:
            return self._with_rows()
        if self.name in _EXPANDING and (expanded := self._expanded()) is not None:
            return expanded
        if self.name in _KEEPS_SHAPE and self.first.expanded is not None and len(self.shared) == 1:
            return self._of_expanded(self.call(lambda x: x.expanded if isinstance(x, SharedValue) else x))
        if self._writes():
            self._make_writable()
        return self._alone()

    def _look_at_table(self) -> None:
        """Of a lookup whose table is shared: the padding's entry is a constant, and `max_norm` would write to it."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        given = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
        table, padding = given.get("weight"), given.get("padding_idx")
        if given.get("max_norm") is not None:
            raise _unsupported(self.first, "embedding with max_norm, which writes to it,")
        if not isinstance(table, SharedValue) or not isinstance(padding, int):
            return
        entries = torch.arange(len(table), device=table.device)
        is_padding = (entries == padding % len(table))[:, None]
        masked = table.with_rows(torch.where(is_padding, table.per_row.detach(), table.per_row))
        self.leaves = [masked if x is table else x for x in self.leaves]
        self.shared = [x for x in self.leaves if isinstance(x, SharedValue)]
        self.first = self.shared[0]

    def _writes(self) -> bool:
        """Whether the function writes to its first argument: by its name, or as an activation that is told to."""
        by_name = self.name.endswith("_") and not self.name.endswith("__")
        in_place = tree_unflatten(self.leaves, self.spec)[1].get("inplace", False) is True
        return by_name or self.name in _WRITING or in_place or (self.name in _ACTIVATIONS and True in self.leaves[1:])

    def _make_writable(self) -> None:
        """What is written must have memory of its own for each row, and views of it must be views here, too."""
        x = self.leaves[0]
        known = not self.name.endswith("_") or self.name in _WRITING or self.name in _ELEMENTWISE
        if (
            not isinstance(x, SharedValue)
            or x._is_param
            or not known
            or x.expanded is not None
            or x.torn
            or not x.per_row.requires_grad
        ):
            raise _unsupported(self.first, f"{self.name}, which writes to it,")
        if any(step == 0 < size - 1 for step, size in zip(x.per_row.stride(), x.per_row.shape, strict=True)):
            if x.viewed:
                raise _unsupported(self.first, f"{self.name}, which writes to it,")
            x.replace(x.per_row.clone(memory_format=torch.contiguous_format))

    def _by_row(self, one_row: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        try:
            return by_row(one_row, randomness="same")(*inputs)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise _unsupported(self.first, f"{self.name} (torch.func.vmap: {str(error).splitlines()[0]})") from error

    def _alone(self) -> Any:
        """Shared values and constants: the same for every row, computed for every row."""

        def one_row(*values: Tensor) -> Any:
            of_row = iter(values)
            out = self.call(lambda x: next(of_row) if isinstance(x, SharedValue) else x)
            flat, spec = tree_flatten(out)
            found.append(spec)
            return tuple(flat)

        found: list[Any] = []
        copied = False
        values = [x.per_row for x in self.shared]
        if self.name == "group_norm":  # vmap wants it so
            values = [x.contiguous() for x in values]
        try:
            flat = self._by_row(one_row, values)
        except UnsupportedModelError:
            if self.name != "view" or any(isinstance(x, torch.dtype) for x in self.leaves):
                raise
            self.func, copied = Tensor.reshape, True  # rows that were expanded may lie in memory as one row does not
            flat = self._by_row(one_row, [x.per_row for x in self.shared])
        results = [SharedValue(x, self.owner, self.meetings) for x in flat]
        for result in results:
            same = [x for x in self.shared if copied or _memory(x.per_row) == _memory(result.per_row)]
            torn = copied or any(x.torn for x in self.shared)
            for x in (result, *same):
                x.viewed, x.torn = x.viewed or bool(same), torn
        return tree_unflatten(results, found[0])

    def _expanded(self) -> SharedValue | None:
        """Expanded to the rows: ``[1, ...]`` or ``[...]`` to ``[B, ...]``."""
        x, *sizes = self.leaves
        if not isinstance(x, SharedValue) or x.expanded is not None:
            return None
        if self.name == "expand_as":
            sizes = list(sizes[0].shape)
        if len(sizes) == 1 and isinstance(sizes[0], torch.Size):
            sizes = list(sizes[0])
        if not sizes or not all(isinstance(size, int) for size in sizes) or sizes[0] != self.rows:
            return None
        own = [1] * (len(sizes) - x.ndim) + list(x.shape)
        if own[0] != 1:
            return None
        front = x.per_row.reshape(self.rows, *own[1:])
        if self.name == "repeat":
            return self._of_expanded(by_row(lambda v: v.repeat(*sizes[1:]))(front) if sizes[1:] else front)
        return self._of_expanded(front.expand(self.rows, *sizes[1:]))

    def _of_expanded(self, expanded: Tensor) -> SharedValue:
        per_row = expanded.unsqueeze(1).expand(self.rows, self.rows, *expanded.shape[1:])
        return SharedValue(per_row, self.owner, self.meetings, expanded)

    def _with_rows(self) -> Any:
        if self.name in _ELEMENTWISE or self.name == "scaled_dot_product_attention" or self._is_batched_product():
            ndim = self.row_data[0].ndim
            if any(x.ndim != ndim for x in self.row_data) or any(
                isinstance(x, Tensor) and x.ndim > ndim for x in self.leaves
            ):
                raise _unsupported(self.first, f"{self.name} with rows of fewer dimensions")
            return self.call(lambda x: self._lined_up(x, ndim) if isinstance(x, SharedValue) else x)
        if self.name in _JOINING:
            ndim = self.row_data[0].ndim
            dim = self._joining_dimension()
            if dim % (ndim + (self.name == "stack")) == self._row_dimension():
                raise _unsupported(self.first, f"{self.name} along the rows")
            return self.call(lambda x: self._lined_up(x, ndim) if isinstance(x, SharedValue) else x)
        if self.name == "broadcast_tensors":
            ndim = max(x.ndim for x in self.leaves if isinstance(x, Tensor))
            return self.call(lambda x: self._lined_up(x, ndim) if isinstance(x, SharedValue) else x)
        if self.name == "einsum":
            return self._einsum()
        if self.name in _OF_ROWS and all(x.expanded is not None for x in self.shared) and self._layout() == "rows":
            return self.call(lambda x: x.expanded if isinstance(x, SharedValue) else x)
        if self.name in _ROWWISE or self._looks_up():
            return self._row_by_row()
        if self.name == "__setitem__" and isinstance(self.leaves[0], Tensor):
            return self._assigned_by_mask()
        raise _unsupported(self.first, self.name)

    def _assigned_by_mask(self) -> None:
        """``x[mask] = value`` with a mask over the leading dimensions and a value for the others."""
        x, mask, value = self.leaves if len(self.leaves) == 3 else (self.first,) * 3
        if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and isinstance(value, SharedValue)):
            raise _unsupported(self.first, self.name)
        if mask.shape != x.shape[: mask.ndim] or value.ndim > x.ndim - mask.ndim:
            raise _unsupported(self.first, self.name)
        where = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
        x.copy_(torch.where(where, self._lined_up(value, x.ndim), x))

    def _is_batched_product(self) -> bool:
        """A product of matrices whose leading dimensions broadcast, rows among them."""
        matrices = self.name in _PRODUCTS and all(x.ndim > 2 for x in self.leaves if isinstance(x, Tensor))
        return matrices and self._row_dimension() < self.row_data[0].ndim - 2

    def _looks_up(self) -> bool:
        """``table[ids]`` or ``table.index_select(0, ids)`` with the rows' own indices."""
        if self.name == "index_select":
            return self.leaves[0] is self.first and self.leaves[1] == 0
        return self.name == "__getitem__" and len(self.leaves) == 2 and not self.row_data[0].dtype.is_floating_point

    def _joining_dimension(self) -> int:
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return int(kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)))

    def _layout(self) -> str:
        """Where the rows are in the data that the shared values meet."""
        place = (self.name, self.owner, self.first.ndim)
        found = {self.meetings.layouts.of((*place, x.ndim), [x.shape], self.rows) for x in self.row_data}
        if len(found) != 1 or None in found:
            shapes = [tuple(x.shape) for x in self.row_data]
            raise _unsupported(self.first, f"{self.name} with tensors of shapes {shapes} for {self.rows} rows")
        return str(found.pop())

    def _row_dimension(self) -> int:
        return 1 if self._layout() == "second" else 0

    def _lined_up(self, x: SharedValue, ndim: int) -> Tensor:
        """``per_row`` with its rows where the data has them, and ``ndim`` dimensions."""
        layout, B, missing = self._layout(), self.rows, ndim - x.ndim
        place = 1 if layout == "second" else 0  # the dimension of the rows in the data
        if missing > place:  # [B, 1, ..., *shape], and [1, B, 1, ..., *shape]
            return (
                x.per_row.reshape(*[1] * place, B, *[1] * (missing - 1 - place), *x.shape)
                if layout != "merged"
                else (self._repeated(x.per_row.reshape(B, *[1] * (missing - 1), *x.shape)))
            )
        if missing < 0:
            raise _unsupported(x, f"{self.name} with rows of fewer dimensions")
        own = place - missing  # the dimension of x that meets the rows
        entries = self.row_data[0].shape[place]
        if x.shape[own] == 1:
            value = x.per_row.squeeze(own + 1).movedim(0, own)
        elif x.expanded is not None and own == 0 and layout == "rows":
            value = x.expanded
        elif x.shape[own] == B and layout != "merged":
            value = x.per_row.diagonal(0, 0, own + 1).movedim(-1, own)
        elif x.shape[own] == entries and layout == "merged":
            return x.per_row.unflatten(1, (B, -1)).diagonal(0, 0, 1).movedim(-1, 0).flatten(0, 1)
        else:
            raise _unsupported(x, f"{self.name} with {B} rows")
        value = value if layout != "merged" else self._repeated(value)
        return value.reshape(*[1] * missing, *value.shape)

    def _repeated(self, value: Tensor) -> Tensor:
        """``[B, ...]`` to ``[B k, ...]``: each row's for its k entries."""
        k = self.row_data[0].shape[0] // self.rows
        return value.unsqueeze(1).expand(self.rows, k, *value.shape[1:]).flatten(0, 1)

    def _has_rows_in_front(self) -> bool:
        """Whether a function of a weight is given the rows' data where its result has rows."""
        if self.name in _PRODUCTS or self._looks_up():
            return True
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        inputs = [*args[:1], kwargs.get("input"), kwargs.get("x1"), kwargs.get("input1")]
        if self.name == "bilinear" or (self.name == "cdist" and all(x.ndim > 2 for x in self.row_data)):
            inputs += [*args[1:2], kwargs.get("input2"), kwargs.get("x2")]
        return all(any(x is given for given in inputs) for x in self.row_data)

    def _row_by_row(self) -> Any:
        """A function of a weight, applied to each row with the row's own copy of the weight."""
        layout, B = self._layout(), self.rows
        place = 1 if layout == "second" else 0
        if not self._has_rows_in_front():
            raise _unsupported(self.first, f"{self.name} with the rows' data in the place of a weight")
        if self.name in _PRODUCTS and any(x.ndim < 2 for x in self.row_data):
            raise _unsupported(self.first, f"{self.name} with a vector of rows")
        if self.name in ("matmul", "__matmul__") and self.leaves[0] is self.first and self.row_data[0].ndim < 3:
            raise _unsupported(self.first, f"{self.name} from the left, which adds rows up")
        moved = [id(x) for x in self.row_data]

        def one_row(*values: Tensor) -> Tensor:
            of_row = iter(values)
            return self.call(
                lambda x: next(of_row) if isinstance(x, SharedValue)
                else _entry(next(of_row)) if id(x) in moved
                else x
            )  # fmt: skip

        def _entry(x: Tensor) -> Tensor:
            return x if layout == "merged" else x.unsqueeze(place)

        def rows_in_front(x: Tensor) -> Tensor:
            if isinstance(x, SharedValue):
                return x.per_row
            return x.unflatten(0, (B, -1)) if layout == "merged" else x.movedim(place, 0)

        inputs = [rows_in_front(x) for x in self.leaves if isinstance(x, SharedValue) or id(x) in moved]
        out = self._by_row(one_row, inputs)
        return out.flatten(0, 1) if layout == "merged" else out.squeeze(place + 1).movedim(0, place)

    def _einsum(self) -> Tensor:
        """With the letter of the rows in front of the shared values' own, or where they have it: each row's own value."""
        merged = self._layout() == "merged"
        equation = next(x for x in self.leaves if isinstance(x, str)).replace(" ", "")
        terms, _, result = equation.partition("->")
        letters, operands = terms.split(","), [x for x in self.leaves if isinstance(x, Tensor)]
        of_data = [t for t, x in zip(letters, operands, strict=True) if any(x is data for data in self.row_data)]
        rows = {t[self._row_dimension()] for t in of_data if "." not in t}
        row = next(iter(rows), "")
        if "." in equation or len(rows) != 1 or result.count(row) != 1 or any(t.count(row) != 1 for t in of_data):
            raise _unsupported(self.first, f"einsum('{equation}')")
        for i, x in enumerate(operands):
            if not isinstance(x, SharedValue):
                continue
            if row not in letters[i]:
                letters[i], operands[i] = row + letters[i], self._repeated(x.per_row) if merged else x.per_row
                continue
            k = letters[i].index(row)
            if merged or letters[i].count(row) != 1 or x.shape[k] != self.rows:
                raise _unsupported(self.first, f"einsum('{equation}')")
            operands[i] = x.per_row.diagonal(0, 0, k + 1).movedim(-1, k)
        return torch.einsum(f"{','.join(letters)}->{result}", *operands)


def share(tensor: Tensor, rows: int, record: Callable[[Tensor], Tensor], owner: str, meetings: Meetings) -> SharedValue:
    """A tensor that is the same for all rows as a shared value; ``record`` taps ``[B, *shape]``."""
    return SharedValue(record(tensor.expand(rows, *tensor.shape)), owner, meetings)
