"""One call of any module, run again row by row in backward: the per-sample gradients of what it owns.

The module's own forward is differentiated, under `torch.func.vmap` where it allows that and in a loop where it does not
(data-dependent control flow, custom autograd functions). Parameters are read when the record arrives, for under FSDP they
are whole just then. Everything is computed in float32 or wider.

Legend: B rows, k entries of a row where a module merged rows into entries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fsdp_dp.by_row import by_row
from fsdp_dp.columns import MAX_SCRATCH_ELEMENTS
from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import Materialized
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.numerics import accumulate_dtype, gamma
from fsdp_dp.records import Record

Gradients = dict[str, Tensor]


_RUNNING_AGAIN: list[nn.Module] = []


def runs_again() -> bool:
    """Whether a module's forward is run now for its rows' gradients, and not by the program."""
    return bool(_RUNNING_AGAIN)


@contextlib.contextmanager
def _owning(module: nn.Module, own: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the module find ``own`` wherever it looks for what it owns; FSDP1 puts views beside the registry."""
    tables: tuple[dict[str, Any], ...] = (vars(module), module._parameters, module._buffers)
    before = [(table, n, table[n]) for table in tables for n in own if n in table]
    _RUNNING_AGAIN.append(module)
    try:
        for table, n, _ in before:
            table[n] = own[n]
        yield
    finally:
        _RUNNING_AGAIN.pop()
        for table, n, x in before:
            table[n] = x


class _NothingElse(TorchFunctionMode):
    """Refuses tensors that share memory with what the module owns: a forward that got them behind the registry."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._memory = {_memory(x) for x in _own_tensors(module).values()} - {None, 0}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Tensor) and _memory(x) in self._memory for x in tree_leaves((args, kwargs))):
            raise UnsupportedModelError(
                f"{type(self._module).__name__} uses a parameter in forward that it does not read from its own attribute (a "
                "list or a view made in __init__?), so that part of its gradient would be lost; read it from self"
            )
        return func(*args, **(kwargs or {}))


def _memory(x: Tensor) -> int | None:
    with torch._C.DisableTorchFunction(), contextlib.suppress(RuntimeError, NotImplementedError):
        return x.untyped_storage().data_ptr()
    return None


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(accumulate_dtype(x.dtype)) if x.is_floating_point() else x.detach()


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as the module has them now, whole.

    Raises:
        UnsupportedModelError: they are not.
    """
    names = [*module._parameters, *module._buffers, *(n for n, x in vars(module).items() if isinstance(x, Tensor))]
    found = {n: getattr(module, n) for n in names}
    for attribute, x in found.items():
        if isinstance(x, Tensor) and (hasattr(x, "placements") or (x.numel() and not x.untyped_storage().size())):
            raise UnsupportedModelError(
                f"'{attribute}' of {type(module).__name__} is sharded in backward, where its gradient is made: under tensor "
                "parallelism use a layer with a rule; otherwise return tensors from the FSDP unit, so that it gathers weights"
            )
    return {attribute: x for attribute, x in found.items() if isinstance(x, Tensor)}


@dataclasses.dataclass(frozen=True)
class LeafCall:
    """A recorded call of ``module``, taken apart by row.

    Attributes:
        wanted: the parameters to differentiate, by attribute.
        others: what else the module owns.
        inputs: the tensors that it was given: ``[B, ...]``, or as they were where ``in_dims`` says None.
        grads: of the outputs that the loss used, ``[B, ...]``.
    """

    module: nn.Module
    record: Record
    wanted: Gradients
    others: Gradients
    inputs: tuple[Tensor, ...]
    in_dims: tuple[int | None, ...]
    grads: tuple[Tensor, ...]

    @staticmethod
    def of(module: nn.Module, record: Record, wanted: frozenset[str], of_rows: Sequence[bool]) -> LeafCall:
        """``of_rows`` says which inputs hold something of each row."""
        own = {n: _wide(x) for n, x in _own_tensors(module).items()}
        shared = record.call.shared
        inputs = [
            _by_row(x, record) if rows and not is_shared else x
            for x, rows, is_shared in zip(map(_wide, record.inputs), of_rows, shared, strict=True)
        ]
        grads = [
            _wide(g) if record.call.gives_shared else _by_row(_wide(g), record) for g in record.grads if g is not None
        ]
        return LeafCall(
            module,
            record,
            {n: x for n, x in own.items() if n in wanted},
            {n: x for n, x in own.items() if n not in wanted},
            tuple(inputs),
            tuple(0 if rows else None for rows in of_rows),
            tuple(grads),
        )

    @property
    def row_bytes(self) -> int:
        """What is kept of a row, wide."""
        of_rows = (x for x, dim in zip(self.inputs, self.in_dims, strict=True) if dim == 0)
        return sum(x.nbytes for x in (*of_rows, *self.grads)) // self.record.rows

    def chunks(self) -> Iterator[slice]:
        """So many rows at a time that their gradients, and about what it takes to compute them, fit the scratch."""
        row = sum(x.numel() for x in self.wanted.values()) + self.row_bytes
        step = max(1, MAX_SCRATCH_ELEMENTS // max(1, row))
        return (slice(start, start + step) for start in range(0, self.record.rows, step))

    def kept(self) -> LeafCall:
        """The same with copies of what the module owns, for after the unit's backward."""
        wanted, others = ({n: x.clone() for n, x in own.items()} for own in (self.wanted, self.others))
        return dataclasses.replace(self, wanted=wanted, others=others)

    def only(self, name: str) -> LeafCall:
        """The same for one parameter."""
        everything = self.others | self.wanted
        others = {n: x for n, x in everything.items() if n != name}
        return dataclasses.replace(self, wanted={name: everything[name]}, others=others)

    def _together(self, x: Tensor) -> Tensor:
        """Outputs ``[B, ...]`` as the module gives them for all rows."""
        if self.record.call.gives_shared:
            return x
        if self.record.layout == "second":
            return x.squeeze(2).movedim(0, 1)
        return x.flatten(0, 1) if x.ndim > 1 else x

    def outputs(self) -> list[Tensor]:
        """All that the module gives, from each row alone, and from nothing that is hidden from the differentiation."""
        apart = self.kept()
        with _NothingElse(self.module):
            parts = [apart.gradients(rows)[1] for rows in apart.chunks()]
        return [self._together(torch.cat(x)) for x in zip(*parts, strict=True)]

    def gradients(self, rows: slice) -> tuple[Gradients, tuple[Tensor, ...]]:
        """Gradients ``[b, *shape]`` of some rows, and all floating-point outputs ``[b, ...]``."""
        inputs = tuple(x[rows] if dim == 0 else x for x, dim in zip(self.inputs, self.in_dims, strict=True))
        grads = tuple(g[rows] for g in self.grads)
        if self.module not in _NOT_BY_VMAP:
            with contextlib.suppress(RuntimeError, NotImplementedError):
                return by_row(self._of_row, in_dims=(self.in_dims, 0))(inputs, grads)  # type: ignore[no-any-return]
        found = self._one_by_one(inputs, grads)
        _NOT_BY_VMAP.add(self.module)
        return found

    def _of_row(self, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Gradients, tuple[Tensor, ...]]:
        def used(wanted: Gradients) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            outputs = self._outputs(wanted, inputs)
            return tuple(x for x, g in zip(outputs, self.record.grads, strict=True) if g is not None), outputs

        found, pull, outputs = torch.func.vjp(used, self.wanted, has_aux=True)  # type: ignore[misc]
        (gradients,) = pull(tuple(g.to(x.dtype) for g, x in zip(grads, found, strict=True)))
        return gradients, outputs

    def _one_by_one(
        self, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
    ) -> tuple[Gradients, tuple[Tensor, ...]]:
        """By autograd, a row at a time."""
        rows = []
        for i in range(len(grads[0])):
            of_row = tuple(x[i] if dim == 0 else x for x, dim in zip(inputs, self.in_dims, strict=True))
            rows.append(self._by_autograd(of_row, [g[i] for g in grads]))
        stacked = {n: torch.stack([found[n] for found, _ in rows]) for n in self.wanted}
        return stacked, tuple(torch.stack(x) for x in zip(*(outputs for _, outputs in rows), strict=True))

    def _by_autograd(self, inputs: tuple[Tensor, ...], grads: Sequence[Tensor]) -> tuple[Gradients, tuple[Tensor, ...]]:
        wanted = {n: x.detach().requires_grad_() for n, x in self.wanted.items()}
        with torch.enable_grad(), _refusing_random_numbers(self.module, self.grads[0].device):
            outputs = self._outputs(wanted, inputs)
            used = [x for x, g in zip(outputs, self.record.grads, strict=True) if g is not None]
            pairs = [(x, g.to(x.dtype)) for x, g in zip(used, grads, strict=True) if x.requires_grad]
            found = torch.autograd.grad(
                [x for x, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True
            ) if pairs else [None] * len(wanted)  # fmt: skip
        gradients = {
            n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), found, strict=True)
        }
        return gradients, tuple(x.detach() for x in outputs)

    def _outputs(self, wanted: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        args, kwargs = self.record.call.arguments(inputs)
        with _owning(self.module, {**self.others, **wanted}):
            output = self.module.forward(*args, **kwargs)  # not through its hooks, FSDP's and the taps' among them
        return tuple(x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point())


_NOT_BY_VMAP: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def _refusing_random_numbers(module: nn.Module, device: torch.device) -> Iterator[None]:
    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    before = states()
    yield
    if not all(map(torch.equal, before, states())):
        raise UnsupportedModelError(
            f"{type(module).__name__} has parameters, no layer rule, and draws random numbers in forward, which cannot be "
            "drawn again row by row; move the dropout into a module of its own (nn.Dropout)"
        )


def _by_row(x: Tensor, record: Record) -> Tensor:
    """``[B, k, ...]``: what the module is given of each row, with the dimension that counts rows or entries."""
    if record.layout == "second":
        return x.movedim(1, 0).unsqueeze(2)
    return x.unflatten(0, (record.rows, -1))


@dataclasses.dataclass(frozen=True)
class Recomputed:
    """The gradient of one large parameter: measured in backward, computed again for the sum.

    What is summed is what was measured: a row that comes out longer the second time (kernels that add in any order) is
    scaled back to the length that it had.
    """

    method: ClassVar[str] = "recompute"
    norm_cost: ClassVar[float] = 2.0  # the forward again, and the gradient

    call: LeafCall
    name: str
    measured: NormTerms

    def norm_terms(self) -> NormTerms:
        return self.measured

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.call.chunks():
            G = self.call.gradients(rows)[0][self.name]
            terms = Materialized(G).norm_terms()
            allowed = (self.measured.norm_sq + self.measured.error)[rows]
            found = terms.norm_sq + terms.error
            shrink = torch.where(found > allowed, (allowed / found).sqrt() * (1 - gamma(8, G.dtype)), 1.0)
            yield rows, G * shrink.to(G.dtype).view(-1, *[1] * (G.ndim - 1)) if bool((shrink < 1).any()) else G

    def weighted_sum(self, weight_B: Tensor, keep_B: Tensor) -> Tensor:
        parts = (Materialized(G).weighted_sum(weight_B[rows], keep_B[rows]) for rows, G in self._pieces())
        return functools.reduce(Tensor.add_, parts)

    def dense(self) -> Tensor:
        return torch.cat([G for _, G in self._pieces()])

    def regroup(self, rows: int) -> Recomputed:
        assert rows == self.call.record.rows
        return self

    def settle(self) -> Recomputed:
        return self
