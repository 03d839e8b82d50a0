"""Ranks that see the same rows and hold parts of the same layers: from DTensor records to this rank's part of a gradient.

By the placement of a row's gradient on the tensor-parallel mesh (docs/norms_across_ranks.md):

* ``Shard``      each rank has a part: the squared norms of the parts add up (`sum_split_norms`);
* ``Replicate``  all ranks have the same: it counts once;
* ``Partial``    the layer saw a part of the positions on each rank (sequence parallelism): the row's gradients are added
  up first (`localize`'s second answer), and are ``Replicate`` from then on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import IndexedRows, Materialized, PerSampleGradient
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.records import Record
from fsdp_dp.sharding.base import Complete, ManagedParameter, ShardedModel, trainable_names
from fsdp_dp.sharding.layout import Cut, chunk, region
from fsdp_dp.sharding.whole import WholeUnit, blocks

_BACKWARDS_CHECKED = 2
"""Whether a gradient is replicated is decided by the model and its plan, so it shows at once; later it would cost time."""

_TOLERANCE = 1e-3
"""Replicated parts of a squared norm may differ so much over ranks: what rounding does in half precision, and no more."""


class TensorParallel(ShardedModel):
    """What models have in common whose layers may be split over ranks of a tensor-parallel mesh."""

    tensor_cuts: dict[str, Cut]
    """Parameter -> how tensor parallelism splits it; replicated ones are not in it."""
    _backwards = 0

    def after_backward(self) -> None:
        super().after_backward()
        self._backwards += 1

    def localize(self, layer: str, module: nn.Module, record: Record) -> tuple[Record, Complete]:
        tensors = (*record.inputs, *record.grads)
        if not any(isinstance(x, DTensor) for x in tensors):
            return record, lambda gradients: gradients
        cuts = {attribute: self.tensor_cuts.get(name) for (m, attribute), name in self.names.items() if m is module}
        inputs = [_Part.of(layer, x) for x in record.inputs]
        grads = [None if x is None else _Part.of(layer, x) for x in record.grads]
        _check_pattern(layer, module, inputs, [g for g in grads if g is not None], cuts)
        outputs = record.call.outputs and tuple(_Part.of(layer, x).local for x in record.call.outputs)
        here = dataclasses.replace(
            record,
            call=dataclasses.replace(record.call, outputs=outputs),
            inputs=tuple(x.local for x in inputs),
            grads=tuple(None if g is None else g.local for g in grads),
        )
        if inputs[0].over == "positions":
            return here, self._add_up
        if isinstance(module, nn.Embedding):
            return here, lambda gradients: _of_own_rows(module, gradients, cuts)
        return here, lambda gradients: gradients

    def _add_up(self, gradients: dict[str, PerSampleGradient]) -> dict[str, PerSampleGradient]:
        """Gradients of rows whose positions are spread over ranks, from one all-reduce a layer."""
        dense = [gradient.dense() for gradient in gradients.values()]
        joint = torch.cat([x.flatten(1) for x in dense], 1)
        dist.all_reduce(joint, group=self.split_group)
        pieces = joint.split([x[0].numel() for x in dense], 1)
        return {
            attribute: Materialized(piece.reshape(x.shape))
            for attribute, piece, x in zip(gradients, pieces, dense, strict=True)
        }

    def publish(self, parameter: ManagedParameter, gradient: Tensor) -> None:
        p = parameter.parameter
        if not isinstance(p, DTensor):
            p.grad = gradient.view(p.shape).to(p.dtype)
            return
        # The parameter's own layout; `to_local` and `DTensor.from_local` would take 40 us for each of hundreds.
        local = gradient.view(p._local_tensor.shape).to(p.dtype)  # type: ignore[attr-defined]
        p.grad = DTensor(local, p._spec, requires_grad=False)  # type: ignore[call-arg]

    def sum_split_norms(self, split: NormTerms, whole: NormTerms) -> NormTerms:
        """Add the squared norms of split parameters over the tensor-parallel ranks; count replicated ones once.

        The replicated part is contributed by the first rank alone, so that all ranks get one and the same number and
        therefore one and the same clip factor. That it is the same everywhere is checked on the way.
        """
        if self.split_group is None:
            return split + whole
        terms, replicated = split.stack(), whole.norm_sq
        if dist.get_rank(self.split_group) == 0:
            terms = terms + whole.stack()
        stacked = torch.cat([terms, torch.stack([replicated, replicated.square()])])
        dist.all_reduce(stacked, group=self.split_group)
        if self._backwards < _BACKWARDS_CHECKED:
            _check_replicated(stacked[3:] / dist.get_world_size(self.split_group))
        return NormTerms.unstack(stacked[:3])


class _Part:
    """What this rank has of one tensor of a record: ``over`` says what it is a part of."""

    def __init__(self, local: Tensor, over: str) -> None:
        self.local, self.over = local, over

    @staticmethod
    def of(layer: str, x: Tensor) -> _Part:
        if not isinstance(x, DTensor):
            return _Part(x, "nothing")
        if len(x.placements) != 1:
            raise UnsupportedModelError(
                f"Layer '{layer}': a tensor on a {x.device_mesh.ndim}-D mesh ({x.placements}) reached it; tensor "
                "parallelism over one mesh dimension is supported"
            )
        (placement,) = x.placements
        if isinstance(placement, Partial):
            return _Part(x.redistribute(placements=[Replicate()]).to_local(), "nothing")
        if not isinstance(placement, Shard):
            return _Part(x.to_local(), "nothing")
        if placement.dim == 0:
            raise UnsupportedModelError(
                f"Layer '{layer}': a tensor split along its first dimension ({placement}) reached it, so tensor-parallel "
                "ranks would hold different rows. Give every layer the batch as its first dimension, and split positions "
                "or features"
            )
        return _Part(x.to_local(), "features" if placement.dim == x.ndim - 1 else "positions")


_SPLIT_ALONG: dict[tuple[type[nn.Module], str, str], dict[str, int]] = {
    (nn.Linear, "nothing", "features"): {"weight": 0, "bias": 0},  # ColwiseParallel
    (nn.Linear, "features", "nothing"): {"weight": 1},  # RowwiseParallel
    (nn.Embedding, "nothing", "features"): {"weight": 1},
    (nn.Embedding, "nothing", "nothing"): {"weight": 0},  # over the vocabulary
}
"""By what input and output gradient are split over: the dimension along which each parameter is split then."""


def _check_pattern(
    layer: str, module: nn.Module, inputs: Sequence[_Part], grads: Sequence[_Part], cuts: dict[str, Cut | None]
) -> None:
    """Refuse what is not one of the ways in which the parts of a layer's gradient fit together."""
    a, g = ({part.over for part in parts} for parts in (inputs, grads))
    found = {attribute: cut.dim for attribute, cut in cuts.items() if cut is not None}
    if not found and (a == g == {"nothing"} or a == g == {"positions"}):
        return
    for (kind, a_over, g_over), dims in _SPLIT_ALONG.items():
        expected = {attribute: dim for attribute, dim in dims.items() if attribute in cuts}
        if isinstance(module, kind) and (a, g, found) == ({a_over}, {g_over}, expected):
            return
    raise UnsupportedModelError(
        f"Layer '{layer}': its input is split over {', '.join(sorted(a))}, its output gradient over "
        f"{', '.join(sorted(g))}, and its parameters along dimensions {found or 'of none'}; supported are ColwiseParallel "
        "and RowwiseParallel on Linear and Embedding, and SequenceParallel on replicated layers"
    )


def _of_own_rows(
    module: nn.Embedding, gradients: dict[str, PerSampleGradient], cuts: dict[str, Cut | None]
) -> dict[str, PerSampleGradient]:
    """Of a table's gradient, the table rows that this rank holds (vocabulary parallelism)."""
    cut, gradient = cuts["weight"], gradients["weight"]
    if cut is None or cut.dim != 0:
        return gradients
    assert isinstance(gradient, IndexedRows)
    offset, size = chunk(module.num_embeddings, cut.parts, cut.index)
    here = (gradient.index_BT >= offset) & (gradient.index_BT < offset + size)
    index = torch.where(here, gradient.index_BT - offset, 0)
    return {"weight": IndexedRows(index, torch.where(here[..., None], gradient.value_BTP, 0), size)}


def _check_replicated(mean_and_mean_square: Tensor) -> None:
    """All ranks see one mean and one mean square of their squared norms, so all or none of them raise."""
    mean, mean_square = mean_and_mean_square
    if bool((mean_square - mean.square() > _TOLERANCE**2 * mean_square).any()):
        raise UnsupportedModelError(
            "Gradients of parameters that tensor parallelism does not split differ over its ranks, so they are parts of a "
            "row's gradient and not copies of it (a norm on the heads or the positions of one rank?). Parallelize these "
            "layers too (SequenceParallel()), or keep their inputs whole"
        )


def tensor_cut(p: nn.Parameter, data_dims: int) -> Cut | None:
    """How a parameter is split on the mesh dimension after the ``data_dims`` of FSDP, if there is one."""
    if not isinstance(p, DTensor) or p.device_mesh.ndim <= data_dims:
        return None
    placement = p.placements[data_dims]
    if not isinstance(placement, Shard):
        return None
    return Cut(placement.dim, p.device_mesh.size(data_dims), p.device_mesh.get_local_rank(data_dims))


def split_group(parameters: dict[str, nn.Parameter], data_dims: int) -> dist.ProcessGroup | None:
    """The tensor-parallel group, the same for all parameters on that mesh dimension."""
    found: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for name, p in parameters.items():
        if not isinstance(p, DTensor) or p.device_mesh.ndim == data_dims:
            continue
        _check_tensor_placements(name, p, p.placements[data_dims:])
        group = p.device_mesh.get_group(data_dims)
        found.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    if len(found) > 1:
        raise ValueError(f"make_private: parameters are split over different ranks ({list(found)}); use one mesh")
    return next(iter(found.values()), None)


def _check_tensor_placements(name: str, p: DTensor, placements: Sequence[object]) -> None:
    if len(placements) > 1 or not isinstance(placements[0], Shard | Replicate):
        raise ValueError(
            f"make_private: parameter '{name}' has placements {p.placements} on a {p.device_mesh.ndim}-D mesh; supported "
            "are tensor parallelism over one mesh dimension, alone or below fully_shard"
        )


class TensorParallelModel(TensorParallel):
    """Tensor parallelism alone: all ranks see the same rows, so nothing but norms is summed over them."""

    kind = "tensor parallel"

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        named = trainable_names(root)
        self.names = {site: name for name, sites in named.items() for site in sites}
        parameters = {name: getattr(*named[name][0]) for name in sorted(named)}
        local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in parameters.items()}
        self.split_group = split_group(parameters, 0)
        self.device = next(iter(local.values())).device
        cuts = {name: tensor_cut(p, 0) for name, p in parameters.items()}
        self.tensor_cuts = {name: cut for name, cut in cuts.items() if cut is not None}
        unit_of = blocks({name: sites[0][0] for name, sites in named.items()}, root)
        self.units = [
            WholeUnit({name: x for name, x in local.items() if unit_of[name] == i}, None)
            for i in range(1 + max(unit_of.values()))
        ]
        self.parameters = [
            ManagedParameter(
                name=name,
                index=index,
                parameter=p,
                numel=p.numel(),
                region=region(p.shape, [cut for cut in [cuts[name]] if cut is not None]),
                split=name in self.tensor_cuts,
                unit=unit_of[name],
                accumulator=self.units[unit_of[name]].accumulators[name],
            )
            for index, (name, p) in enumerate(parameters.items())
        ]
        self._global_numel = sum(p.numel() for p in parameters.values())
