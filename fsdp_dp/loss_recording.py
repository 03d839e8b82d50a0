"""Is the loss a sum over rows? It is recorded from the outputs to ``backward()``, and replayed with others (rule 8).

With some rows' outputs and labels exchanged, and with all of them made one of the others, the gradients of the other rows
must not move: a mean over the batch's valid tokens moves them, and so does one over the rows with the largest losses.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.exchanges import copy_row, exchange_rows, exchanged_rows
from fsdp_dp.label_watch import LOSSES, averaged_labels
from fsdp_dp.modes import put_in, take_out
from fsdp_dp.numerics import accumulate_dtype

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
COARSE_TOLERANCE = 2e-3
_LOSSES_WITH_WEIGHTS = (
    F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.multi_margin_loss,
)  # fmt: skip
_LOOK_UPS = (Tensor.__getitem__, Tensor.index_select, torch.index_select)
_WITHOUT_RESULT = (Tensor.__setitem__, Tensor.register_hook)
_TO_NUMBERS = (Tensor.item, Tensor.__float__, Tensor.__int__)
_READS = (*_TO_NUMBERS, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__)
_FROM_NUMBERS = frozenset("tensor as_tensor from_numpy scalar_tensor full full_like new_tensor new_full".split())
_BY_NUMBERS = frozenset("div div_ true_divide __truediv__ mul mul_ multiply __mul__ __rmul__".split())


class LossRecording(TorchFunctionMode):
    """Records what happens between the model's outputs and ``loss.backward()``, then replays it with rows exchanged."""

    def __init__(self, rows: int, managed: frozenset[int]) -> None:
        super().__init__()
        self._rows, self._managed = rows, managed
        self._choose(variant=0)
        self._outputs: list[Tensor] = []
        self._outputs_again: list[Tensor] = []
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self._autocast: list[tuple[str, torch.dtype, bool]] = []  # under which each call was made
        self._told: list[int] = []
        """Calls that gave Python numbers which rows that were exchanged had changed."""
        self._active = False
        self.averages_over_labels = False
        self.asked: bool | None = None
        """Whether the loss was examined: None before any forward, False while its backward is still to come."""

    def _choose(self, variant: int, complement: bool = False) -> None:
        self._exchanging = exchanged_rows(self._rows, complement, variant)
        self._kept = [row for row in range(self._rows) if row not in self._exchanging]
        self._copied: int | None = None  # the row that takes the others' places; None: each takes the next one's

    def start(self, outputs: list[Tensor]) -> None:
        self._outputs = outputs
        self._active = True
        self.asked = False
        put_in(self)

    def stop(self) -> None:
        self._active = False
        take_out(self)
        self._forget()

    def _forget(self) -> None:
        self._outputs, self._calls, self._autocast, self._told = [], [], [], []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._active:
            return func(*args, **kwargs)
        if func is Tensor.backward and self._is_ours(args[0]):
            self._active, self.asked = False, True
            self._before_backward(args[0], kwargs)
            self._forget()
            return func(*args, **kwargs)
        if _caller().endswith("grad_scaler.py"):
            from fsdp_dp.optimizer_gate import refuse_grad_scaler

            refuse_grad_scaler()
        result = func(*args, **kwargs)
        if func in LOSSES and result.requires_grad:
            self.averages_over_labels |= averaged_labels(args, kwargs, self._rows) is not None
        device_type = self._outputs[0].device.type if self._outputs else "cpu"
        autocast = device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
        self._calls.append((func, args, kwargs, result))
        self._autocast.append(autocast)
        return result

    def _is_ours(self, loss: Tensor) -> bool:
        """Whether a loss comes from this model's outputs: its graph is walked up to the first boundaries.

        Raises:
            UnsupportedModelError: it does, but also from a hidden output, or from trainable tensors beside the model.
        """
        ours = {output.grad_fn for output in self._outputs}
        nodes, seen, problem = [loss.grad_fn], set(), None
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            problem = problem or self._problem(node)
            if type(node).__name__ != "_BoundaryBackward":
                nodes.extend(next_node for next_node, _ in node.next_functions)
        if seen.isdisjoint(ours):
            return False
        if problem is not None:
            raise UnsupportedModelError(problem)
        return True

    def _problem(self, node: Any) -> str | None:
        """Why a node of the loss's graph must not be there."""
        if type(node).__name__ == "_TapBackward":
            return (
                "The loss uses a tensor of the model that is not among its outputs (an auxiliary loss kept as an "
                "attribute?), where rows may be coupled unseen; return it from forward"
            )
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in self._managed:
            return (
                f"The loss uses a tensor of shape {tuple(variable.shape)} that requires grad and is not in the model (a "
                "head, a loss with parameters): its gradient would not be private. Put it into the model, or freeze it"
            )
        return None

    def _before_backward(self, loss: Tensor, kwargs: dict[str, Any]) -> None:
        if loss.numel() != 1 and kwargs.get("gradient") is None:
            raise PrivacyError(
                f"backward() of a loss with shape {tuple(loss.shape)}: the loss must be a scalar, the mean or the sum "
                "over the rows of the microbatch (PrivacyConfig.loss_reduction says which); call loss.mean() or .sum()"
            )
        if self._rows < 2 or any(loss is x for x in self._outputs):
            return
        with torch.enable_grad():
            before = torch.autograd.grad(loss, self._outputs, _seed(kwargs, loss), retain_graph=True, allow_unused=True)
            examined = self._examine(loss, kwargs, before)
        if not examined:
            warnings.warn(
                "The loss could not be replayed with other labels (a custom autograd.Function, or values drawn or read "
                "between forward and backward), so that it is a sum over rows is taken on trust: no row's loss may depend "
                "on another row",
                stacklevel=5,
            )

    def _examine(self, loss: Tensor, kwargs: dict[str, Any], before: tuple[Tensor | None, ...]) -> bool:
        """Compare with replays on other rows; False if not even the recorded rows can be replayed."""
        try:
            same = self._replay(loss, kwargs, lambda x: x, lambda x: x)
            if self._difference(before, same) is not None:
                return False
            off = next((x for x in self._replays(loss, kwargs, before) if x is not None), None)
        except (RuntimeError, LookupError, ValueError, TypeError):
            return False
        if off is not None:
            raise UnsupportedModelError(
                "The loss couples the rows of a microbatch: exchanging some rows' outputs and labels changed the "
                f"gradients of other rows by {off:.2g}. A mean over the batch's valid tokens does this, and one that "
                "class weights weigh (weight=); use a mean over a fixed number of tokens, or the mean over rows of each "
                "row's own mean (Hugging Face: a constant num_items_in_batch)"
            )
        return not self._told or not self._numbers_come_back(min(self._told))

    def _numbers_come_back(self, told: int) -> bool:
        """Whether anything of Python's is in the loss after call ``told``: in a replay it is what it was, whatever the rows.

        A number that was read and is used as it is, is replayed.
        """
        known = {id(x) for x in self._outputs}
        for i, (func, args, kwargs, result) in enumerate(self._calls):
            given = tree_leaves((args, kwargs))
            numbers = any(isinstance(x, int | float) and not isinstance(x, bool) and id(x) not in known for x in given)
            tensors = any(isinstance(x, Tensor) and id(x) not in known for x in given)
            if i == told and func is Tensor.__bool__:
                return True  # a branch, which a replay does not take
            if i > told and (tensors or (numbers and func.__name__ in _BY_NUMBERS) or func.__name__ in _FROM_NUMBERS):
                return True
            known.update(id(x) for x in (*given, *tree_leaves(result)) if isinstance(x, Tensor))
            if func in _TO_NUMBERS:
                known.add(id(result))
        return False

    def _replays(
        self, loss: Tensor, kwargs: dict[str, Any], before: tuple[Tensor | None, ...]
    ) -> Iterator[float | None]:
        """By how much the rows that stay move, when others are exchanged or lose their labels; in four choices of rows.

        Also when all others become one that stays: that with the least gradient, and that with the largest. Losses that
        choose rows (the hardest, all but the largest) then choose others, whichever they chose.
        """
        size_B = sum(_sizes_by_row(x, self._rows) for x in before if x is not None and _has_rows(x, self._rows))
        for variant, complement in itertools.product((0, 1), (False, True)):
            self._choose(variant, complement)
            for labels in (self._exchanged_labels, self._ignored_labels)[: 1 if complement else 2]:
                yield self._difference(before, self._replay(loss, kwargs, self._exchanged, labels))
            if isinstance(size_B, Tensor):
                for choose in (min, max):
                    self._copied = choose(self._kept, key=size_B.tolist().__getitem__)
                    yield self._difference(before, self._replay(loss, kwargs, self._exchanged, self._exchanged_labels))

    def _exchanged(self, output: Tensor) -> Tensor:
        return self._exchange(output) if _has_rows(output, self._rows) else output

    def _exchange(self, x: Tensor) -> Tensor:
        if self._copied is None:
            return exchange_rows(x, self._exchanging, self._rows)
        return copy_row(x, self._copied, self._exchanging, self._rows)

    def _replay(
        self,
        loss: Tensor,
        kwargs: dict[str, Any],
        change_output: Callable[[Tensor], Tensor],
        change_label: Callable[[Tensor], Tensor],
    ) -> list[Tensor | None]:
        """Gradients of the model's outputs when they, and what else the loss used, are changed so."""
        values: dict[int, Any] = {}
        leaves = []
        for output in self._outputs:
            leaf = change_output(output).detach().clone()
            leaves.append(leaf.requires_grad_())
            values[id(output)] = leaf

        numbers: dict[int, Any] = {}
        made = set(map(_memory, self._outputs))

        def current(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) not in values:
                other = change_label(x)
                # A copy, so that the program's own running totals are not written twice.
                values[id(x)] = x.detach().clone() if other is x else other
            return values[id(x)]

        calls = zip(self._calls, self._autocast, strict=True)
        for i, ((func, args, call_kwargs, result), (kind, dtype, enabled)) in enumerate(calls):
            if func in _READS and not _equal(args[0], current(args[0])):
                self._told.append(i)
            if func in _TO_NUMBERS and isinstance(args[0], Tensor):
                numbers[id(result)] = func(current(args[0]))
            if func not in _WITHOUT_RESULT and not any(isinstance(x, Tensor) for x in tree_leaves(result)):
                continue
            if func is Tensor.__setitem__:
                made.add(_memory(args[0]))
            if func.__name__ in _BY_NUMBERS:
                args = tuple(numbers.get(id(x), x) if isinstance(x, int | float) else x for x in args)
            takes = [x for x in tree_leaves((args, call_kwargs)) if isinstance(x, Tensor)]
            given = not takes or (made.isdisjoint(map(_memory, takes)) and self._takes_batch(func, takes, result))
            if given and isinstance(result, Tensor) and result._version == 0:
                current(result)  # labels, perhaps, and not to be drawn again
                continue
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                replayed = func(*tree_map(current, args), **tree_map(current, call_kwargs))
            for old, new in zip(tree_leaves(result), tree_leaves(replayed), strict=True):
                values[id(old)] = new
                if isinstance(old, Tensor):
                    made.add(_memory(old))
        new_loss = values[id(loss)]
        return list(torch.autograd.grad(new_loss, leaves, _seed(kwargs, new_loss), allow_unused=True))

    def _difference(self, before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> float | None:
        """By how much the gradients of rows that stayed moved, relative to their size; None if they did not."""
        for old, new in zip(before, after, strict=True):
            if old is None or new is None:
                if old is not new:
                    return float("inf")
                continue
            here = [x.to_local() if isinstance(x, DTensor) else x for x in (old, new)]
            kept = [x.reshape(self._rows, -1)[self._kept] if _has_rows(x, self._rows) else x for x in here]
            off = float((kept[0].double() - kept[1].double()).norm() / kept[0].double().norm().clamp(min=1e-300))
            if off > TOLERANCE.get(old.dtype, COARSE_TOLERANCE):
                return off
        return None

    def _exchanged_labels(self, x: Tensor) -> Tensor:
        """Other inputs of the loss: tensors with one entry for each row, or for each token, exchange rows."""
        tokens = {self._rows} | {o.shape[0] * o.shape[1] for o in self._outputs if o.ndim > 1}
        if x.ndim == 0 or x.shape[0] not in tokens or x.shape[0] % self._rows:
            return x
        return x if self._is_class_weight(x) else self._exchange(x)

    def _takes_batch(self, func: Callable[..., Any], takes: Sequence[Tensor], result: Any) -> bool:
        """Whether labels of a batch were taken out of those of a dataset, of which there may happen to be as many."""
        if func not in _LOOK_UPS or not isinstance(result, Tensor) or result.shape[:1] != (self._rows,):
            return False
        labels, numbers = takes[0], takes[1:]
        if labels.ndim == 1 and any(o.ndim > 2 and o.shape[0] * o.shape[1] == labels.numel() for o in self._outputs):
            return False  # one for each token of the batch
        return labels.shape[0] != self._rows and all(x.shape == (self._rows,) for x in numbers)

    def _is_class_weight(self, x: Tensor) -> bool:
        """Weights of classes, of which there may happen to be as many as rows; binary losses also take weights of these."""
        return any(
            (kwargs.get("weight") is x or kwargs.get("pos_weight") is x or (len(args) > 2 and args[2] is x))
            and x.ndim < (args[0] if args else kwargs["input"]).ndim
            for func, args, kwargs, _ in self._calls
            if func in _LOSSES_WITH_WEIGHTS
        )

    def _ignored_labels(self, x: Tensor) -> Tensor:
        """As above, but where cross entropy ignores some of the labels, it ignores all of the exchanged rows'."""
        ignore = self._ignore_index(x)
        exchanged = self._exchanged_labels(x)
        if ignore is None or exchanged is x or not bool((x == ignore).any()):
            return exchanged
        out = x.detach().clone().reshape(self._rows, -1)
        out[list(self._exchanging)] = ignore
        return out.view(x.shape)

    def _ignore_index(self, x: Tensor) -> int | None:
        """The ignore index of the call that takes ``x``, or a reshaped ``x``, as its target."""
        same = {id(x)}
        for func, args, kwargs, result in self._calls:
            reshaped = isinstance(result, Tensor) and result.numel() == x.numel() and not result.is_floating_point()
            if reshaped and any(isinstance(a, Tensor) and id(a) in same for a in args):
                same.add(id(result))
            if func in (F.cross_entropy, F.nll_loss):
                target = args[1] if len(args) > 1 else kwargs.get("target")
                if isinstance(target, Tensor) and id(target) in same and not target.is_floating_point():
                    return int(args[4]) if len(args) > 4 else int(kwargs.get("ignore_index", -100))
        return None


def _caller() -> str:
    """The file that called a torch function, beyond modes that passed it on."""
    frame: Any = sys._getframe(2)
    passing = ("loss_recording.py", "label_watch.py", "torch/overrides.py")
    while frame is not None and frame.f_code.co_filename.endswith(passing):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_code.co_filename)


def _seed(kwargs: dict[str, Any], loss: Tensor) -> Tensor | None:
    gradient = kwargs.get("gradient")
    return gradient if gradient is not None else torch.ones_like(loss)


def _equal(before: Tensor, after: Tensor) -> bool:
    """But for rounding, which another order of the rows changes."""
    if before.shape != after.shape:
        return False
    x, y = before.detach().double(), after.detach().double()
    return torch.allclose(x, y, rtol=COARSE_TOLERANCE, atol=0, equal_nan=True)


def _sizes_by_row(x: Tensor, rows: int) -> Tensor:
    here = x.to_local() if isinstance(x, DTensor) else x
    norm_B = torch.linalg.vector_norm(here.reshape(rows, -1), dim=1, dtype=accumulate_dtype(here.dtype))
    return norm_B.double().nan_to_num(0, 0, 0)


def _memory(x: Tensor) -> int:
    """The same for all views of a tensor: what is written to one is in all."""
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def _has_rows(x: Tensor, rows: int) -> bool:
    return x.ndim > 0 and x.shape[0] % rows == 0
