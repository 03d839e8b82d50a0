"""Fake ranks, and the few places of the engine where a fake tensor cannot pass, or would not do what a GPU does.

Within `fake_ranks` a process is rank 0 of as many as one likes: torch's `fake` process group completes every collective at
once. Within `fake_values` the engine runs on tensors without values: what ranks agree on is what rank 0 says, checks of
values have passed, noise is drawn in place by a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from fsdp_dp import clipping, engine, gradients, kernels, numerics, vector_gradients
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.kernels import outer, table_rows, tied, vectors
from fsdp_dp.kernels.position_sums import Layer
from fsdp_dp.kernels.release import Segment, Verdict
from fsdp_dp.norm_terms import NormTerms
from fsdp_dp.recorder import Recorder
from fsdp_dp.sharding import ShardedModel, sums, tensor_parallel
from fsdp_dp.sharding.sums import Unit


@contextmanager
def fake_ranks(world_size: int) -> Iterator[dist.Store]:
    """This process as rank 0 of ``world_size``; their store."""
    if dist.is_initialized():
        raise RuntimeError("planning: a process group is initialized; plan in a process of its own, without torchrun")
    store = FakeStore()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=store)
    try:
        yield store
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_values(on_gpu: bool) -> Iterator[None]:
    """The engine on tensors without values; with ``on_gpu``, it takes the ways that it takes on one."""
    replaced: list[tuple[Any, str, Any]] = [
        (ShardedModel, "agree", lambda self, payload: payload),
        (ShardedModel, "any_rank", lambda self, flag: flag),
        (ShardedModel, "dedicate_groups", lambda self: None),
        (tensor_parallel, "_check_replicated", lambda mean_and_mean_square: None),
        (Recorder, "_has_equal_rows", lambda self, inputs: True),
        (Unit, "give_away", _give_away),
        (Unit, "make_room", _make_room),
        (engine, "privatize_all_", _privatize_all_),
    ]
    if on_gpu:
        replaced += [
            *((module, "on_tensor_cores", _all_bfloat16) for module in (numerics, gradients)),
            (kernels, "available", lambda device: True),
            (sums, "_room_is_dear", lambda device: True),
            (outer, "_runs_on", lambda device: True),
            (outer, "weighted_outers", _weighted_outers),
            (outer, "GhostNorms", _GhostNorms),
            (outer, "forms_well", lambda a, g: True),
            (outer, "stored_rows", _stored_rows),
            (outer, "stored_norms", _stored_norms),
            (outer, "weighted_rows", _weighted_rows),
            (outer, "instantiated_norms", _instantiated_norms),
            (table_rows, "compress", _compressed),
            (table_rows, "weighted_sum", lambda index_BT, value_BTP, weight_B, out: None),
            (tied, "norm_terms", _tied_norm_terms),
            (clipping, "_has_kernel", lambda mask_B, dtype: False),
            (vector_gradients, "position_sums", _position_sums),
            (vectors, "usable", lambda x: False),
            (F, "rms_norm", _fused_rms_norm),
        ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        yield


def _privatize_all_(segments: Sequence[Segment], *, later: Iterable[Sequence[Segment]], **_: Any) -> Verdict:
    for _part in later:
        pass
    return Verdict()


def fake_reducer(model: nn.Module) -> None:
    """Of DDP, where the model is in it: an all-reduce is over at once, and buckets stay as they were laid out."""
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, lambda _, bucket: _all_reduced(bucket))  # torch reads annotations
        model.reducer = _WithoutRebuilding(model.reducer)  # type: ignore[assignment]


class _WithoutRebuilding:
    """DDP's reducer, less what looks at values."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _all_reduced(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    dist.all_reduce(bucket.buffer())
    over: torch.futures.Future[Tensor] = torch.futures.Future()
    over.set_result(bucket.buffer())
    return over


def _give_away(unit: Unit) -> None:
    unit.fresh = unit.given_away = True


def _make_room(unit: Unit) -> None:
    """In the storage that the sums had before: it cannot be set anew here."""
    if unit.given_away and not unit.buffer.untyped_storage().nbytes():
        unit.buffer.untyped_storage().resize_(unit.buffer.nbytes)
    unit.given_away = False


def drop_given_away(private: PrivacyEngine | None) -> None:
    """The memory of sums that were given away goes with the gradients in it."""
    for unit in private.model.units if private is not None else ():
        if unit.given_away:
            unit.buffer.untyped_storage().resize_(0)


def sums_of(private: PrivacyEngine) -> Iterable[Tensor]:
    return (unit.buffer for unit in private.model.units if not unit.given_away)


def past_first_step(private: PrivacyEngine) -> None:
    """As after the first step, whose checks look at values: the model and the loss have been found to be good."""
    private.guard.pass_first_release()
    private._examination.pass_over()


def records_of(private: PrivacyEngine) -> Iterable[Tensor]:
    """The tensors in which the rows' gradients are kept at this moment."""
    microbatch = private._recorder.current
    held = microbatch.sums.held if microbatch is not None and microbatch.sums is not None else []
    return (x for gradient in held for x in vars(gradient).values() if isinstance(x, Tensor))


# What the kernels of a Hopper GPU allocate.


def _all_bfloat16(*factors: Tensor) -> bool:
    return all(x.dtype == torch.bfloat16 for x in factors)


def _readable(x: Tensor) -> Tensor:
    """As `kernels.outer` makes a factor readable; addresses of fakes would be aligned."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _weighted_outers(
    sums: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    weight_KB: Tensor,
    owners: Sequence[int] | None = None,
    onto: Sequence[Tensor | None] | None = None,
    part: int = 0,
) -> list[Tensor]:
    _held_at_once = [_readable(x) for a, g, _ in sums for x in (a, g)]
    return [torch.empty(g.shape[2], a.shape[2], dtype=torch.float32) if out is None else out for a, g, out in sums]


class _GhostNorms:
    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self.owners: list[int] = []

    def add(
        self, inputs: Sequence[tuple[Tensor, Sequence[Tensor]]], owners: Sequence[Sequence[int]] | None = None
    ) -> None:
        _held_at_once = [_readable(x) for a, gs in inputs for x in (a, *gs)]
        self.owners += (
            [owner for of_input in owners for owner in of_input] if owners else [0 for _, gs in inputs for _ in gs]
        )

    def terms(self) -> Tensor:
        owners, self.owners = self.owners, []
        return torch.zeros(len(owners), 3, self._rows, dtype=torch.float64, device=self._device)


def _stored_rows(a_BTD: Tensor, g_BTP: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _held_at_once = _readable(a_BTD), _readable(g_BTP)
    rows, D, P = len(a_BTD), a_BTD.shape[2], g_BTP.shape[2]
    return torch.empty(rows, P, D, dtype=dtype), torch.zeros(rows, 1, 2)


def _stored_norms(formed: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.zeros(len(formed), 3, len(formed[0][0]), dtype=torch.float64)


def _weighted_rows(
    stored_BPD: Tensor, weight_B: Tensor, out: Tensor | None = None, onto: Tensor | None = None, part: int = 0
) -> Tensor:
    return torch.empty(stored_BPD.shape[1:], dtype=torch.float32) if out is None else out


def _compressed(index_BT: Tensor, g_BTP: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(index_BT), torch.empty(g_BTP.shape, dtype=torch.float32)


def _instantiated_norms(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    _held_at_once = [_readable(x) for pair in pairs for x in pair]
    return torch.zeros(len(pairs), 3, len(pairs[0][0]), dtype=torch.float64)


def _tied_norm_terms(a_BSD: Tensor, g_BSV: Tensor, h_BTD: Tensor, index_BT: Tensor, head: NormTerms) -> NormTerms:
    _held_at_once = _readable(a_BSD), _readable(h_BTD)
    return head


def _position_sums(layers: Sequence[Layer], columns: int) -> Tensor:
    return torch.empty(len(layers[0].g_BTC), columns, dtype=torch.float32)


class _FusedRmsNorm(torch.autograd.Function):
    """CUDA's kernel keeps the input and a number for each position; on CPU, torch composes it of several operations."""

    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_BTC, weight, x_BTC.new_empty(*x_BTC.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x_BTC)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x_BTC, weight, _ = ctx.saved_tensors
        return torch.empty_like(x_BTC), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _fused_rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float | None = None) -> Tensor:
    return _FusedRmsNorm.apply(x, weight)  # type: ignore[no-any-return]
