"""Any other module that owns parameters and has no children: its own forward, run again row by row (see `leaf_calls`).

That each output row is a function of its own input row is proven for every form in which the module is called, the first
time that it is: the rows, run apart, must give what the program saw when they were run together. What they give is then
stored, or, where a row's gradient is large, measured and computed once more for the sum.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import Materialized, PerSampleGradient
from fsdp_dp.layers.registry import has_rule, rule_of_any_leaf
from fsdp_dp.leaf_calls import LeafCall, Recomputed
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.planner import STORE_AT_MOST
from fsdp_dp.records import Call, Record

OfRows = tuple[bool, ...]
_PROVEN: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, OfRows]] = weakref.WeakKeyDictionary()
_FORMS_KEPT = 1000
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_COARSE_TOLERANCE = 5e-2


def is_proven(module: nn.Module, call: Call, inputs: Sequence[Tensor], rows: int) -> bool:
    """Whether the module is known to treat rows apart when it is called so."""
    return has_rule(module) or _form(module, call, inputs, rows) in _PROVEN.get(module, {})


def _form(module: nn.Module, call: Call, inputs: Sequence[Tensor], rows: int) -> Hashable:
    options = tuple(x for x in call.leaves if isinstance(x, bool | int | float | str | None))
    return rows, module.training, call.shared, call.gives_shared, options, tuple((x.shape, x.dtype) for x in inputs)


@rule_of_any_leaf
def leaf(module: nn.Module, record: Record, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """Its own forward, run again row by row: stored, or measured and computed again for the sum."""
    call = LeafCall.of(module, record, wanted, _which_inputs_are_of_rows(module, record, wanted))
    data = call.row_bytes
    large = {n for n, x in call.wanted.items() if record.rows * (x.nbytes - STORE_AT_MOST * data) > x.nbytes}
    stored: dict[str, list[Tensor]] = {n: [] for n in wanted - large}
    terms: dict[str, list[Tensor]] = {n: [] for n in large}
    for rows in call.chunks():
        gradients, _ = call.gradients(rows)
        for n in stored:
            stored[n].append(gradients[n])
        for n in large:
            terms[n].append(Materialized(gradients[n]).norm_terms().stack())
    out: dict[str, PerSampleGradient] = {n: Materialized(_at_least_2d(torch.cat(G))) for n, G in stored.items()}
    kept = call.kept() if large else call
    for n in large:
        out[n] = Recomputed(kept.only(n), n, NormTerms.unstack(torch.cat(terms[n], 1)))
    return out


def _at_least_2d(G: Tensor) -> Tensor:
    return G if G.ndim > 1 else G[:, None]


def _which_inputs_are_of_rows(module: nn.Module, record: Record, wanted: frozenset[str]) -> OfRows:
    """Known of this form, or found out.

    Raises:
        UnsupportedModelError: the rows, run apart, do not give what was computed from all of them.
    """
    known, form = _PROVEN.setdefault(module, {}), _form(module, record.call, record.inputs, record.rows)
    if form in known:
        return known[form]
    for of_rows in _guesses(record):
        if _gives_the_outputs(LeafCall.of(module, record, wanted, of_rows)):
            if len(known) < _FORMS_KEPT:
                known[form] = of_rows
            return of_rows
    raise UnsupportedModelError(
        f"{type(module).__name__} (parameters: {', '.join(sorted(wanted))}) has no layer rule, and run on each row alone it "
        "does not compute what it computed from all rows: it mixes rows, keeps a state, or is given something that is "
        "neither of the rows nor the same for all. Move its parameters into supported layers, or freeze them"
    )


def _guesses(record: Record) -> list[OfRows]:
    """Sizes suggest which inputs are of rows; where a table happens to be as long as the batch, only the first one is."""
    front = next(g.shape[0] for g in record.grads if g is not None)
    fits = [
        (x.ndim > 1 and x.shape[1] == record.rows)
        if record.layout == "second"
        else (x.ndim > 0 and x.shape[0] in (record.rows, front))
        for x in record.inputs
    ]
    shared = record.call.shared
    by_size = tuple(map(any, zip(shared, fits, strict=True)))
    first_only = tuple(s or (f and not any(fits[:i])) for i, (s, f) in enumerate(zip(shared, fits, strict=True)))
    return list(dict.fromkeys((by_size, first_only)))


def _gives_the_outputs(call: LeafCall) -> bool:
    record, expected = call.record, call.record.call.outputs
    assert expected is not None
    try:
        found = call.outputs()
    except UnsupportedModelError:
        raise
    except (RuntimeError, LookupError, ValueError, TypeError, AssertionError):
        return False
    # A wide output may come from narrow numbers: a buffer in float32 among parameters in bfloat16.
    computed = [x.dtype for x in (*record.inputs, *expected, *call.module.parameters()) if x.is_floating_point()]
    narrow = record.call.autocast or any(dtype.itemsize < 4 for dtype in computed)
    triples = zip(found, expected, record.grads, strict=True)
    return all(_close(x, y, narrow) for x, y, g in triples if g is not None)


def _close(x: Tensor, y: Tensor, narrow: bool) -> bool:
    if x.shape != y.shape:
        return False
    tolerance = _COARSE_TOLERANCE if narrow or y.is_cuda else _TOLERANCE.get(y.dtype, _COARSE_TOLERANCE)
    x, y = x.double().nan_to_num(0, 1, -1), y.double().nan_to_num(0, 1, -1)
    off, size = (v.flatten(1).norm(dim=1) if v.ndim > 1 else v.abs() for v in (x - y, y))
    return bool((off <= tolerance * torch.maximum(size, size.mean())).all())
