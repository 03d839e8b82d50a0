"""Whether, and how, the kernels over the factors (a, g) of a Linear's gradient do what `gradients.OuterProduct` asks.

They run on Hopper, whose tensor cores' rounding is known (`numerics.tensor_core_roundoff`), and take half precision with
widths in units of 16 bytes; a wide output of another width (GPT-2's 50 257 words) is padded with zeros. Everything else
stays with the torch references, which compute the same on any device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fsdp_dp import kernels
from fsdp_dp.numerics import tensor_core_roundoff

_HALVES = (torch.bfloat16, torch.float16)
_WIDTH_UNIT = 8


_WORTH_PADDING = 1024
"""Outputs: what is copied is little beside what the torch reference would copy of it."""


def usable(a_BTD: Tensor, g_BTP: Tensor) -> bool:
    """Whether all of this module takes these factors; decided by type and shape alone."""
    return g_BTP.shape[2] % _WIDTH_UNIT == 0 and usable_padded(a_BTD, g_BTP)


def usable_padded(a_BTD: Tensor, g_BTP: Tensor) -> bool:
    """Whether `weighted_outers` and `GhostNorms` do, at the price of a copy of ``g``."""
    P = g_BTP.shape[2]
    return (
        a_BTD.dtype == g_BTP.dtype
        and a_BTD.dtype in _HALVES
        and a_BTD.numel() > 0 < g_BTP.numel()
        and a_BTD.shape[2] % _WIDTH_UNIT == 0
        and (P % _WIDTH_UNIT == 0 or P >= _WORTH_PADDING)
        and _runs_on(a_BTD.device)
    )


@functools.cache
def _runs_on(device: torch.device) -> bool:
    return kernels.available(device) and torch.cuda.get_device_capability(device) == (9, 0)


def weighted_outers(
    sums: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    weight_KB: Tensor,
    owners: Sequence[int] | None = None,
    onto: Sequence[Tensor | None] | None = None,
    part: int = 0,
) -> list[Tensor]:
    """``sum_i w_i g_i^T a_i`` ``[P, D]`` float32 of every ``(a_BTD, g_BTP, out)``, in ``out`` where one is given.

    ``weight_KB`` is ``[B]``, the same weights for all sums, or ``[K, B]``, of which every sum takes its owner's. Rows of
    weight zero are not looked at. An ``out`` may be ``[W, P / W, D]`` with any strides but a last one of 1; to its
    ``part``-th slice ``onto`` is added, contiguous ``[P / W, D]``, each where there is one.
    """
    from fsdp_dp.kernels import weighted_outer as implementation

    whole = [(_readable(a), _readable(g), _room(a, g) if out is None else out) for a, g, out in sums]
    implementation.weighted_outers(whole, weight_KB, owners, onto, part)
    return [out for _, _, out in whole]


def _room(a_BTD: Tensor, g_BTP: Tensor) -> Tensor:
    return torch.empty(g_BTP.shape[2], a_BTD.shape[2], dtype=torch.float32, device=a_BTD.device)


def weighted_outer(a_BTD: Tensor, g_BTP: Tensor, weight_B: Tensor, out: Tensor | None = None) -> Tensor:
    """One of `weighted_outers`."""
    return weighted_outers([(a_BTD, g_BTP, out)], weight_B)[0]


def instantiated_norms(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """float64 ``[n, 3, B]`` of ``(a_BTD, g_BTP)`` each: the norm terms of gradients that are formed and dropped."""
    from fsdp_dp.kernels import instantiate

    readable = [(_readable(a), _readable(g)) for a, g in pairs]
    return instantiate.norm_terms(readable, tensor_core_roundoff(pairs[0][0].device))


def forms_well(a_BTD: Tensor, g_BTP: Tensor) -> bool:
    """Whether `stored_rows` has a tile for every multiprocessor; for less, whole matrix products have smaller ones."""
    from fsdp_dp.kernels import instantiate

    return instantiate.fills(a_BTD.shape[0], a_BTD.shape[2], g_BTP.shape[2], a_BTD.device)


def stored_rows(a_BTD: Tensor, g_BTP: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient of every row ``[B, P, D]``, rounded to ``dtype``, and what `stored_norms` needs to measure just that."""
    from fsdp_dp.kernels import instantiate

    return instantiate.store(_readable(a_BTD), _readable(g_BTP), dtype)


def stored_norms(formed: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """float64 ``[n, 3, B]`` of what `stored_rows` gave, as many rows each: the norm terms of what is stored."""
    from fsdp_dp.kernels import instantiate

    return instantiate.terms_of_stored(formed)


def weighted_rows(
    stored_BPD: Tensor, weight_B: Tensor, out: Tensor | None = None, onto: Tensor | None = None, part: int = 0
) -> Tensor:
    """``sum_i w_i G_i`` float32 of stored gradients, in one pass; all but the first are as in `weighted_outers`."""
    from fsdp_dp.kernels import instantiate

    if out is None:
        out = torch.empty(stored_BPD.shape[1:], dtype=torch.float32, device=stored_BPD.device)
    instantiate.weighted_rows(stored_BPD, weight_B, out, onto, part)
    return out


class GhostNorms:
    """Norm terms of layers ``[B, ...]`` that `usable` takes, whose measurement ends in one launch (see `ghost_norm`)."""

    def __init__(self, rows: int, device: torch.device) -> None:
        from fsdp_dp.kernels import ghost_norm

        self._norms = ghost_norm.GhostNorms(rows, device, tensor_core_roundoff(device))

    def add(
        self, inputs: Sequence[tuple[Tensor, Sequence[Tensor]]], owners: Sequence[Sequence[int]] | None = None
    ) -> None:
        """``(a_BTD, gs)``: each input once, with the output gradients ``[B, T, P_l]`` of the layers that were given it.

        ``owners`` says of each of these layers which clipping group it is in, 0 if nothing is said.
        """
        self._norms.add([(_readable(a), [_readable(g) for g in gs]) for a, gs in inputs], owners)

    @property
    def owners(self) -> list[int]:
        """Whose each of the n is that `terms` gives next."""
        return self._norms.owners

    def terms(self) -> Tensor:
        """float64 ``[n, 3, B]``, whose sum over n is that of all layers since the last call."""
        return self._norms.terms()


def _readable(x: Tensor) -> Tensor:
    """``x`` as the copy engine can read it: last stride 1, others positive and in units of 16 bytes, aligned.

    With zeros behind its last dimension, where that is no multiple of these.
    """
    if x.shape[-1] % _WIDTH_UNIT:
        return F.pad(x, (0, -x.shape[-1] % _WIDTH_UNIT))
    *outer, last = x.stride()
    if last == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % _WIDTH_UNIT == 0 for s in outer):
        return x
    return x.clone(memory_format=torch.contiguous_format)
