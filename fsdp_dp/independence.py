"""Is row i's contribution a function of row i alone? Asked of the running program before the first release (rule 8).

Clipping bounds what a row adds only if no other row's term depends on it. Two questions, on the first microbatch:

* the *loss*: it is recorded between the model's outputs and ``backward()``, and replayed with some rows'
  outputs and labels exchanged, and with all of them made one of the others. The gradients of the other rows must not
  move (a mean over the batch's valid tokens moves them, and so does one over the rows with the largest losses).
* the *model*: forward and backward run twice more, first with some rows' inputs, and gradients of its outputs,
  exchanged. The outputs and the per-sample norms of the other rows must not move (batch statistics move them, and so
  does a layer whose records do not line up with the rows). Gradients of their outputs are multiplied by powers of two,
  another one for each row, and exactly these must come back in their norms: so a layer that is given two of them in each
  other's place shows as well. Then the same with the rows exchanged that stayed.

Neither releases anything. The second costs two forwards and backwards, at the first step only.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.label_watch import LOSSES, averaged_labels
from fsdp_dp.modes import put_in, take_out
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.taps import is_of_rows

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
_COARSE_TOLERANCE = 2e-3
_NEGLIGIBLE = 1e-4
_TIMES_NOISE, _MOST_NOISE = 4.0, 1e-2
"""Attention's backward on GPUs adds up in any order. Of queries and keys, whose tokens cancel, an unchanged pass in bfloat16
moved norms by up to 3.7e-3 (350M, 8 rows of 1024 tokens, two H200s; docs/numerics.md)."""

_LEVELS = 16
"""Rows are told apart by factors down to 2^-15. Of more than 16 that stay, those 16 apart have the same."""
_LOSSES_WITH_WEIGHTS = (
    F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.multi_margin_loss,
)  # fmt: skip
_LOOK_UPS = (Tensor.__getitem__, Tensor.index_select, torch.index_select)
_WITHOUT_RESULT = (Tensor.__setitem__, Tensor.register_hook)
_TO_NUMBERS = (Tensor.item, Tensor.__float__, Tensor.__int__)
_BY_NUMBERS = frozenset("div div_ true_divide __truediv__ mul mul_ multiply __mul__ __rmul__".split())


@functools.cache
def exchanged_rows(rows: int, complement: bool = False, variant: int = 0) -> tuple[int, ...]:
    """Which rows are exchanged: about half, not the first, so chosen that shifting or reversing the rows gives others.

    (Were it every second row, a layer that is given the rows two places further on would not show.) A second ``variant``
    is another such choice, where there is one.
    """
    found: list[set[int]] = []
    for seed in itertools.count():
        draw = random.Random(seed)
        chosen = {row for row in range(1, rows) if draw.random() < 0.5}
        moved = [{(row + k) % rows for row in chosen} for k in range(1, rows)] + [{rows - 1 - row for row in chosen}]
        if chosen not in found and (rows < 2 or (0 < len(chosen) < rows and chosen not in moved)):
            found.append(chosen)
        if len(found) > variant or (found and seed > 100):
            break
    return tuple(row for row in range(rows) if (row in found[-1]) is not complement)


def exchange_rows(x: Tensor, exchanged: Sequence[int], rows: int) -> Tensor:
    """``x`` ``[B, ...]`` with the ``exchanged`` rows replaced, each by the row after it."""
    if isinstance(x, DTensor):  # split over features or positions: every rank has all rows
        here = exchange_rows(x.to_local(), exchanged, rows)
        return DTensor.from_local(here, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
    source = torch.arange(rows, device=x.device)
    places = torch.tensor(exchanged, dtype=torch.long, device=x.device)
    source[places] = (places + 1) % rows
    return x.detach().reshape(rows, -1)[source].view(x.shape)


def copy_row(x: Tensor, row: int, places: Sequence[int], rows: int) -> Tensor:
    """``x`` ``[B, ...]`` with ``row`` in these places as well."""
    if isinstance(x, DTensor):
        here = copy_row(x.to_local(), row, places, rows)
        return DTensor.from_local(here, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
    source = torch.arange(rows, device=x.device)
    source[torch.tensor(places, dtype=torch.long, device=x.device)] = row
    return x.detach().reshape(rows, -1)[source].view(x.shape)


def _as_it_is(x: Any) -> Any:
    return x


def scale_rows(x: Tensor, scale_B: Tensor) -> Tensor:
    """``x`` ``[B, ...]``, each row by its own factor."""
    if isinstance(x, DTensor):
        here = scale_rows(x.to_local(), scale_B)
        return DTensor.from_local(here, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
    return x * scale_B.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class FirstMicrobatch:
    """The first microbatch of an engine: its inputs, its random state, its loss, and the two questions.

    The second is asked in `RUNS` reruns: ``run_exchanged(i)``, the caller's ``measured``, ``compare()``.

    ``padding_only``: none of its rows is real.

    Ranks with an odd ``data_rank`` exchange the rows that the others keep. So a forward that couples row i of one
    rank with row i of another (context parallelism, statistics over ranks) shows as well.
    """

    def __init__(
        self,
        root: nn.Module,
        rows: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        device: torch.device,
        managed: frozenset[int],
        data_rank: int = 0,
        padding_only: bool = False,
    ) -> None:
        self._root, self.rows, self._data_rank, self._padding_only = root, rows, data_rank, padding_only
        self._norm_sq: list[dict[str, Tensor]] = []
        self._noise = 0.0
        self._narrowest = torch.float64
        # Copies: the program may fill the same tensors with the next microbatch.
        self._args, self._kwargs = tree_map(_copy, args), tree_map(_copy, kwargs)
        self._device = device
        self._modes = {module: module.training for module in root.modules()}
        self._random_state = _random_state(device)
        self._autocast = torch.is_autocast_enabled(device.type)
        self._autocast_dtype = torch.get_autocast_dtype(device.type)
        self._outputs: list[Tensor] = []
        self._outputs_again: list[Tensor] = []
        self._output_grads: dict[int, Tensor] = {}
        self._choose(0)
        self.loss = LossRecording(rows, managed)

    RUNS: ClassVar[int] = 2

    def _choose(self, run: int) -> None:
        """Which rows are exchanged, and the factors of the others."""
        complement = self._data_rank % 2 != run
        self._exchanged = exchanged_rows(self.rows, complement) if self.rows > 1 else ()
        self._kept = [row for row in range(self.rows) if row not in self._exchanged]
        self._scale_B = torch.ones(self.rows, dtype=torch.float64, device=self._device)
        # Of a loss that is an output, rows cannot be scaled; float16 would lose what is scaled down.
        by_row = all(map(self._is_by_row, self._output_grads.values()))
        if by_row and torch.float16 not in (self._narrowest, self._autocast and self._autocast_dtype):
            levels = torch.arange(len(self._kept), device=self._device) % _LEVELS
            self._scale_B[self._kept] = torch.exp2(-levels.double())

    def saw_outputs(self, outputs: Any) -> None:
        tensors = _differentiable(outputs)
        self._outputs = [_lengths(x) for x in tensors]
        self.loss.start(tensors)

    def saw_output_grad(self, index: int, grad: Tensor) -> None:
        self._output_grads[index] = grad

    def run_exchanged(self, run: int) -> None:
        """Forward and backward with some rows' inputs exchanged; the caller looks at the norms."""
        self._choose(run)
        self._run(self._exchange if self.rows > 1 else _as_it_is, self._scale)

    def run_unchanged(self) -> None:
        """Forward and backward as they were: what moves now moves by itself, in kernels that add up in any order."""
        exchanged = self._outputs_again
        self._run(_as_it_is, _as_it_is)
        again, self._outputs_again = self._norm_sq.pop(), exchanged
        before = {name: x.sqrt() for name, x in self._norm_sq[0].items()}
        if not before:  # this rank's rows have no gradient; it ran for the others
            return
        total = torch.stack([x.nan_to_num(0, 0, 0) for x in before.values()]).norm(dim=0)
        for name, old in before.items():
            if name in again:
                new = again[name].sqrt()
                size = torch.maximum(torch.maximum(old, new), _NEGLIGIBLE * total)
                moved = ((old - new).abs() / size).nan_to_num(0, 0, 0)
                self._noise = max(self._noise, float(moved.max()))

    def _run(self, change: Callable[[Any], Any], scale: Callable[[Tensor], Tensor]) -> None:
        with _restored(self._random_state, self._device), _in_modes(self._modes), torch.enable_grad():
            with torch.autocast(self._device.type, dtype=self._autocast_dtype, enabled=self._autocast):
                outputs = self._root(*tree_map(change, self._args), **tree_map(change, self._kwargs))
            tensors = _differentiable(outputs)
            self._outputs_again = [_lengths(x) for x in tensors]
            grads = {i: scale(change(grad)) for i, grad in self._output_grads.items() if i < len(tensors)}
            pairs = [(tensors[i], grad) for i, grad in grads.items()]
            torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])

    def measured(self, norm_sq: dict[str, Tensor], narrowest: torch.dtype) -> None:
        """Squared norms ``[B]`` of the rows' gradients of each parameter: as run first, then as rerun."""
        self._norm_sq.append(norm_sq)
        self._narrowest = min(self._narrowest, narrowest, key=lambda dtype: dtype.itemsize)

    @property
    def _tolerance(self) -> float:
        return _TOLERANCE.get(torch.bfloat16 if self._autocast else self._narrowest, _COARSE_TOLERANCE)

    @property
    def was_measured(self) -> bool:
        return bool(self._norm_sq)

    @property
    def may_be_noise(self) -> bool:
        """Whether a norm of a row whose inputs stayed has moved, by no more than kernels of half precision may move it."""
        if self._tolerance < _COARSE_TOLERANCE:
            return False
        try:
            self.compare()
        except UnsupportedModelError:
            return True
        return False

    def compare(self) -> bool:
        """Raises UnsupportedModelError if a norm, or an output, of a row whose inputs stayed has moved.

        Norms may move `_TIMES_NOISE` as far as they moved by themselves (`run_unchanged`), up to `_MOST_NOISE`.

        Returns whether it could have shown: some row was really exchanged, and another one has a gradient.
        """
        scale = self._scale_B[self._kept]
        before = {n: x[self._kept].sqrt() for n, x in self._norm_sq[0].items()}
        after = {n: x[self._kept].sqrt() / scale.to(x.dtype) for n, x in self._norm_sq[-1].items()}
        total = torch.stack([x.nan_to_num(0, 0, 0) for x in (*before.values(), *after.values())]).norm(dim=0)
        zeros = torch.zeros_like(total)
        for name in sorted(before.keys() | after.keys()) if self.rows > 1 else ():
            old, new = before.get(name, zeros), after.get(name, zeros)
            # A gradient that is zero but for rounding may well round to something else.
            size = torch.maximum(torch.maximum(old, new), _NEGLIGIBLE * total)
            allowed = max(self._tolerance, min(_TIMES_NOISE * self._noise, _MOST_NOISE))
            moved = ((old - new).abs() > allowed * size) & old.isfinite() & new.isfinite()
            if bool(moved.any()):
                row = int(moved.nonzero()[0])
                raise UnsupportedModelError(
                    f"Row {self._kept[row]}'s gradient of '{name}' changed (norm {float(old[row]):.4g} -> "
                    f"{float(new[row]):.4g}) when only other rows' inputs were exchanged and their losses weighed "
                    "differently, so clipping a row does not bound its influence. Look for statistics over the batch, a "
                    "loss inside the model that averages over all valid tokens, a layer whose input does not have the "
                    "batch as its first dimension (positions without a batch dimension) or has it in another order, "
                    "activations exchanged with other data-parallel ranks (context parallelism), or a hook whose gradient "
                    "is not linear in the one that it is given. Windows with as many positions as the microbatch has rows "
                    "are told apart by another microbatch size"
                )
        self._compare_outputs()
        return bool((total > 0).any()) and self.can_show()

    def _compare_outputs(self) -> None:
        """Raises UnsupportedModelError if an output of a row whose inputs stayed has moved: the loss would couple rows."""
        for i, (first, again) in enumerate(zip(self._outputs, self._outputs_again, strict=False)):
            if self.rows == 1 or i not in self._output_grads or not self._is_by_row(again):
                continue
            old, new = (x[self._kept].reshape(len(self._kept), -1).double() for x in (first, again))
            size = torch.maximum(old, new).clamp(min=_NEGLIGIBLE * float(old.max()))
            moved = (((old - new).abs() > self._tolerance * size) & old.isfinite() & new.isfinite()).any(1)
            if bool(moved.any()):
                raise UnsupportedModelError(
                    f"Row {self._kept[int(moved.nonzero()[0])]}'s output {i} changed when only other rows' inputs were "
                    "exchanged, so its loss depends on them and clipping the row does not bound its influence. Look for "
                    "statistics over the batch, detached ones too"
                )

    @property
    def shows(self) -> int:
        """How much a rehearsal can show: 2, all; 1, rows in each other's place, of rows that are equal; 0, nothing."""
        return 2 if self.can_show() else int(self.rows > 1 and not self._padding_only)

    def can_show(self) -> bool:
        """Whether exchanging rows changes the inputs."""
        if self.rows == 1:
            return False
        inputs = [x for x in tree_leaves((self._args, self._kwargs)) if isinstance(x, Tensor)]
        return any(not torch.equal(x, self._exchange(x)) for x in inputs)

    def _is_by_row(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == self.rows

    def _exchange(self, x: Any) -> Any:
        return exchange_rows(x, self._exchanged, self.rows) if self._is_by_row(x) else x

    def _scale(self, grad: Tensor) -> Tensor:
        return scale_rows(grad, self._scale_B) if bool((self._scale_B != 1).any()) else grad


def _differentiable(outputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if is_of_rows(x)]


def _lengths(x: Tensor) -> Tensor:
    """Of the vectors along the last dimension: of logits ``[B, T, V]``, ``[B, T]``. Enough to see that a row has moved."""
    here = (x.to_local() if isinstance(x, DTensor) else x).detach()
    return torch.linalg.vector_norm(here, dim=-1, dtype=accumulate_dtype(here.dtype)) if here.ndim > 1 else here.abs()


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
        self._outputs, self._calls, self._autocast = [], [], []

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
        return True

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

        for (func, args, call_kwargs, result), (kind, dtype, enabled) in zip(self._calls, self._autocast, strict=True):
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
            if off > _TOLERANCE.get(old.dtype, _COARSE_TOLERANCE):
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
    passing = ("independence.py", "label_watch.py", "torch/overrides.py")
    while frame is not None and frame.f_code.co_filename.endswith(passing):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_code.co_filename)


def _seed(kwargs: dict[str, Any], loss: Tensor) -> Tensor | None:
    gradient = kwargs.get("gradient")
    return gradient if gradient is not None else torch.ones_like(loss)


def _sizes_by_row(x: Tensor, rows: int) -> Tensor:
    here = x.to_local() if isinstance(x, DTensor) else x
    norm_B = torch.linalg.vector_norm(here.reshape(rows, -1), dim=1, dtype=accumulate_dtype(here.dtype))
    return norm_B.double().nan_to_num(0, 0, 0)


def _memory(x: Tensor) -> int:
    """The same for all views of a tensor: what is written to one is in all."""
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def _has_rows(x: Tensor, rows: int) -> bool:
    return x.ndim > 0 and x.shape[0] % rows == 0


def _random_state(device: torch.device) -> list[Any]:
    """Of torch, and of Python and NumPy, by which models draw which spans to mask."""
    numpy = sys.modules.get("numpy.random")
    states = [torch.get_rng_state(), random.getstate(), numpy and numpy.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def _restored(states: list[Any], device: torch.device) -> Iterator[None]:
    """Run with the given random state, so that dropout repeats its masks; the program's own state is put back."""
    now = _random_state(device)
    _set_random_state(states, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


@contextmanager
def _in_modes(modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Run with modules in the given training or evaluation mode: the program may have gone on to evaluate."""
    now = {module: module.training for module in modes}
    try:
        for module, training in modes.items():
            module.training = training
        yield
    finally:
        for module, training in now.items():
            module.training = training


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _set_random_state(states: list[Any], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if states[2] is not None:
        sys.modules["numpy.random"].set_state(states[2])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[3], device)
