"""Is row i's contribution a function of row i alone? Asked of the running program before the first release (rule 8).

Clipping bounds what a row adds only if no other row's term depends on it. Two questions, on the first microbatch:

* the *loss*: it is recorded between the model's outputs and ``backward()``, and replayed (`loss_recording`).
* the *model*: forward and backward run twice more, first with some rows' inputs, and gradients of its outputs,
  exchanged. The outputs and the per-sample norms of the other rows must not move (batch statistics move them, and so
  does a layer whose records do not line up with the rows). Gradients of their outputs are multiplied by powers of two,
  another one for each row, and exactly these must come back in their norms: so a layer that is given two of them in each
  other's place shows as well. Then the same with the rows exchanged that stayed.

Neither releases anything. The second costs two forwards and backwards, at the first step only.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.exchanges import exchange_rows, exchanged_rows, scale_rows
from fsdp_dp.loss_recording import COARSE_TOLERANCE, TOLERANCE, LossRecording
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.taps import is_of_rows

_NEGLIGIBLE = 1e-4
_TIMES_NOISE, _MOST_NOISE = 4.0, 1e-2
"""Attention's backward on GPUs adds up in any order. Of queries and keys, whose tokens cancel, an unchanged pass in bfloat16
moved norms by up to 3.7e-3 (350M, 8 rows of 1024 tokens, two H200s; docs/numerics.md)."""

_LEVELS = 16
"""Rows are told apart by factors down to 2^-15. Of more than 16 that stay, those 16 apart have the same."""


def _as_it_is(x: Any) -> Any:
    return x


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
        self._outputs: list[_Seen] = []
        self._outputs_again: list[_Seen] = []
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
        self._outputs = [_seen(x) for x in tensors]
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

    def run_again(self) -> None:
        """Forward and backward of what may be a single row, of which nothing can be exchanged: state shows all the same.

        Raises:
            UnsupportedModelError: an output is another one now, so that it depends on what was run before.
        """
        self._run(_as_it_is, _as_it_is)
        self._norm_sq[1:] = []
        for i, (first, again) in enumerate(zip(self._outputs, self._outputs_again, strict=False)):
            if i in self._output_grads and first[0].shape == again[0].shape:
                pairs = ([x.reshape(1, -1).double() for x in seen] for seen in (first, again))
                if bool(self._moved(*pairs).any()):
                    raise UnsupportedModelError(
                        f"The model's output {i} changed when the first microbatch was run again as it was: the model keeps "
                        "something of the rows that it has seen (a memory, a queue, running statistics in an attribute), so "
                        "a row's gradient depends on earlier rows, and clipping it does not bound their influence. Forget "
                        "it at the start of forward"
                    )

    def _run(self, change: Callable[[Any], Any], scale: Callable[[Tensor], Tensor]) -> None:
        with _restored(self._random_state, self._device), _in_modes(self._modes), torch.enable_grad():
            with torch.autocast(self._device.type, dtype=self._autocast_dtype, enabled=self._autocast):
                outputs = self._root(*tree_map(change, self._args), **tree_map(change, self._kwargs))
            tensors = _differentiable(outputs)
            self._outputs_again = [_seen(x) for x in tensors]
            grads = {i: scale(change(grad)) for i, grad in self._output_grads.items() if i < len(tensors)}
            pairs = [(tensors[i], grad) for i, grad in grads.items()]
            torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])

    def measured(self, norm_sq: dict[str, Tensor], narrowest: torch.dtype) -> None:
        """Squared norms ``[B]`` of the rows' gradients of each parameter: as run first, then as rerun."""
        self._norm_sq.append(norm_sq)
        self._narrowest = min(self._narrowest, narrowest, key=lambda dtype: dtype.itemsize)

    @property
    def _tolerance(self) -> float:
        return TOLERANCE.get(torch.bfloat16 if self._autocast else self._narrowest, COARSE_TOLERANCE)

    @property
    def was_measured(self) -> bool:
        return bool(self._norm_sq)

    @property
    def may_be_noise(self) -> bool:
        """Whether a norm of a row whose inputs stayed has moved, by no more than kernels of half precision may move it."""
        if self._tolerance < COARSE_TOLERANCE:
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
            if self.rows == 1 or i not in self._output_grads or not self._is_by_row(again[0]):
                continue
            moved = self._moved(*([self._of_kept(x) for x in seen] for seen in (first, again))).any(1)
            if bool(moved.any()):
                raise UnsupportedModelError(
                    f"Row {self._kept[int(moved.nonzero()[0])]}'s output {i} changed when only other rows' inputs were "
                    "exchanged, so its loss depends on them and clipping the row does not bound its influence. Look for "
                    "statistics over the batch, detached ones too"
                )

    def _moved(self, first: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
        """Which vectors are others now, of lengths and components ``[rows, vectors]``."""
        (old, old_part), (new, new_part) = first, again
        size = torch.maximum(old, new).clamp(min=_NEGLIGIBLE * float(old.max()))
        off = (old - new).abs() > self._tolerance * size
        off |= (old_part - new_part).abs() > max(_TURNED, self._tolerance) * size
        return off & old.isfinite() & new.isfinite()

    def _of_kept(self, x: Tensor) -> Tensor:
        return x[self._kept].reshape(len(self._kept), -1).double()

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


_Seen = tuple[Tensor, Tensor]
_TURNED = 0.2
"""Of a vector's length: half precision moves a component by less, and turning the vector moves it by about its length."""


def _seen(x: Tensor) -> _Seen:
    """Of the vectors along the last dimension, the length and a component: of logits ``[B, T, V]``, both ``[B, T]``.

    Enough to see that a row has moved, or turned.
    """
    here = (x.to_local() if isinstance(x, DTensor) else x).detach()
    if here.ndim < 2:
        return here.abs(), here
    length = torch.linalg.vector_norm(here, dim=-1, dtype=accumulate_dtype(here.dtype))
    places = torch.arange(here.shape[-1], dtype=torch.float64)
    direction = (places.square() * 0.7 + 1).sin().mul(2**0.5).to(here)  # no two places alike, and about 1 in the mean
    with torch.autocast(here.device.type, enabled=False):
        return length, here @ direction


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
