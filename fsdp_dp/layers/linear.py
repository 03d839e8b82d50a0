"""Linear: ``y_t = W x_t + b`` on any number of positions, so ``G_i = sum_t g_t x_t^T`` and ``sum_t g_t``.

GPT-2's `Conv1D` of Hugging Face is a Linear whose weight is stored transposed, ``[D, P]``.
"""

from __future__ import annotations

from torch import Tensor, nn

from fsdp_dp.gradients import Materialized, OuterProduct, PerSampleGradient
from fsdp_dp.kernels import position_sums
from fsdp_dp.layers.registry import layer_rule, rule_for
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.vector_gradients import SumOverPositions


def positions(x: Tensor) -> Tensor:
    """``[B, ..., C]`` -> ``[B, T, C]`` with all middle dimensions merged (T = 1 for ``[B, C]``)."""
    return x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])


@layer_rule(nn.Linear)
def linear(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """An outer product of input and output gradient over positions; two Gram matrices where that is cheaper."""
    a_BTD, g_BTP = positions(a), positions(g)
    out: dict[str, PerSampleGradient] = {}
    if "weight" in wanted:
        out["weight"] = OuterProduct(a_BTD, g_BTP)
    if "bias" in wanted:
        waits = position_sums.usable(g_BTP)
        out["bias"] = SumOverPositions(g_BTP) if waits else Materialized(g_BTP.sum(1, dtype=accumulate_dtype(g.dtype)))
    return out


@layer_rule("transformers.pytorch_utils.Conv1D")
def transposed_linear(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """As for Linear, transposed."""
    out = linear(module, a, g, wanted)
    if "weight" in out:
        out["weight"] = OuterProduct(positions(g), positions(a))
    return out


def is_product(module: nn.Module) -> bool:
    """Whether a layer's forward is one product, of which its output is all."""
    return rule_for(module) in (linear, transposed_linear)
