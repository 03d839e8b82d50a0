"""`nn.MultiheadAttention`: its packed projections as layers of their own, which torch's functional form would go around.

While an engine is attached, an attention has a forward that computes what torch's does out of modules: a `Projection` for
each part of ``in_proj_weight`` that is used at once, and its own ``out_proj``. Projections own nothing and are in no module
tree: names, state dicts and FSDP units stay as they are. Without gradients torch's own forward runs, fast path included.

Legend: B rows, L queries, S keys, E width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import Materialized, OuterProduct, PerSampleGradient
from fsdp_dp.layers.linear import linear
from fsdp_dp.layers.registry import layer_rule
from fsdp_dp.parts import Part

_PARTS = {"qkv": (0, 3), "kv": (1, 3), "q": (0, 1), "k": (1, 2), "v": (2, 3)}


class Projection(Part):
    """``x W[part]^T + b[part]`` with an attention's ``in_proj_weight`` and ``in_proj_bias``, or its ``q_proj_weight``."""

    documented_as = "MultiheadAttention"

    def __init__(self, owner: nn.MultiheadAttention, part: str) -> None:
        self.packed = owner._qkv_same_embed_dim
        super().__init__(owner, "in_proj_weight" if self.packed else f"{part}_proj_weight", "in_proj_bias")
        start, stop = (i * owner.embed_dim for i in _PARTS[part])
        self.part, self.width = slice(start, stop), 3 * owner.embed_dim

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = getattr(self.owner, self.weight_name), getattr(self.owner, "in_proj_bias")  # noqa: B009
        whole = self.part == slice(0, self.width)
        if self.packed and not whole:
            weight = weight[self.part]
        return F.linear(x, weight, bias if bias is None or whole else bias[self.part])

    def spread(self, g: Tensor) -> Tensor:
        """Gradients of this part among those of all, the others zero."""
        return F.pad(g, (self.part.start, self.width - self.part.stop))


@layer_rule(Projection)
def projection(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """Projections as Linears, packed or separate; masks, dropout, sequence or batch first. Not add_bias_kv, add_zero_attn."""
    assert isinstance(module, Projection)
    out = linear(module, a, g, wanted)
    if "weight" in wanted and module.packed:
        outer = out["weight"]
        assert isinstance(outer, OuterProduct)
        out["weight"] = OuterProduct(outer.a_BTD, module.spread(outer.g_BTP))
    if "bias" in wanted:
        out["bias"] = Materialized(module.spread(out["bias"].dense()))
    return out


def is_attention(module: nn.Module) -> bool:
    """Whether a module computes what torch's attention does."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def refusal_of_attention(module: nn.Module) -> str | None:
    assert isinstance(module, nn.MultiheadAttention)
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn of MultiheadAttention have no rule; set both to False"
    return None


def projections(module: nn.Module) -> dict[str, Projection]:
    """The parts that an attention may use, by name."""
    assert isinstance(module, nn.MultiheadAttention)
    names = _PARTS if module._qkv_same_embed_dim else ("q", "k", "v")
    return {name: Projection(module, name) for name in names}


def _forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `nn.MultiheadAttention.forward`."""
    if not torch.is_grad_enabled():
        return nn.MultiheadAttention.forward(  # type: ignore[no-any-return]
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    if query.dim() != 3:
        raise UnsupportedModelError(
            f"MultiheadAttention was given a query of shape {tuple(query.shape)}, without a batch; give it three dimensions"
        )
    q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in _projected(self, query, key, value))
    hint = is_causal and key_padding_mask is None and not need_weights
    mask = None if hint else _mask(attn_mask, key_padding_mask, q)
    dropout = self.dropout if self.training else 0.0
    weights = None
    if need_weights:
        weights_BHLS, mixed = _with_weights(q, k, v, mask, dropout)
        weights = weights_BHLS.mean(1) if average_attn_weights else weights_BHLS
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, hint)
    out_BLE = self.out_proj(mixed.transpose(1, 2).flatten(2))
    return out_BLE if self.batch_first else out_BLE.transpose(0, 1), weights


Projection.forward_of_owner = _forward


def _projected(self: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values ``[B, L, E]``, what is the same tensor in one product, as torch does."""
    q, k, v = (x if self.batch_first else x.transpose(0, 1) for x in (query, key, value))
    project = self._parts
    if "qkv" in project and key is value:
        if query is key:
            return project["qkv"](q).chunk(3, -1)  # type: ignore[no-any-return]
        return project["q"](q), *project["kv"](k).chunk(2, -1)
    return project["q"](q), project["k"](k), project["v"](v)


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q_BHLD: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores, ``[B or 1, H or 1, L or 1, S]``; True forbids."""
    masks = []
    if attn_mask is not None:
        added = _added(attn_mask, q_BHLD.dtype)
        masks.append(added[None, None] if added.dim() == 2 else added.unflatten(0, q_BHLD.shape[:2]))
    if key_padding_mask is not None:
        masks.append(_added(key_padding_mask, q_BHLD.dtype)[:, None, None])
    return sum(masks[1:], masks[0]) if masks else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf")) if mask.dtype == torch.bool else mask


def _with_weights(
    q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    scores = q_BHLD * q_BHLD.shape[-1] ** -0.5 @ k_BHSD.mT
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights, weights @ v_BHSD
