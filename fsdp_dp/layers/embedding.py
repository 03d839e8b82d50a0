"""Embedding and EmbeddingBag: the gradient of a row touches only the table rows that the sample looked up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import IndexedRows, PerSampleGradient
from fsdp_dp.layers.linear import positions
from fsdp_dp.layers.registry import layer_rule
from fsdp_dp.numerics import accumulate_dtype
from fsdp_dp.records import Record


def _check(module: nn.Module) -> str | None:
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True divides by counts over the whole batch, which couples rows; set it to False"
    if module.max_norm is not None:
        return "max_norm rewrites the table in forward according to the data, un-noised; set max_norm=None"
    if module.sparse:
        return "sparse=True asks for sparse gradients, but noise is dense; set sparse=False"
    return None


@layer_rule(nn.Embedding, check=_check)
def embedding(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """The table rows that were looked up. Not with max_norm, scale_grad_by_freq or sparse."""
    assert isinstance(module, nn.Embedding)
    index_BT, g_BTP = a.reshape(a.shape[0], -1).long(), positions(g)
    if module.padding_idx is not None:
        g_BTP = torch.where((index_BT == module.padding_idx)[..., None], 0, g_BTP)
    return {"weight": IndexedRows.compress(index_BT, g_BTP, module.num_embeddings)}


def _check_bag(module: nn.Module) -> str | None:
    assert isinstance(module, nn.EmbeddingBag)
    if module.mode == "max":
        return "mode='max' has no rule; use 'sum' or 'mean', or nn.Embedding and a maximum over its positions"
    return _check(module)


@layer_rule(nn.EmbeddingBag, check=_check_bag, keeps="all", layouts=("rows", "merged"))
def embedding_bag(module: nn.Module, record: Record, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """As for Embedding: sums and means of ids [rows, positions], weighted or not; no offsets, no maximum."""
    assert isinstance(module, nn.EmbeddingBag)
    args, kwargs = record.call.arguments(record.inputs)
    given = dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)) | kwargs
    index_BT, weights_BT = given["input"].long(), given.get("per_sample_weights")
    if given.get("offsets") is not None or index_BT.ndim != 2:
        raise UnsupportedModelError(
            "An EmbeddingBag was given bags of different lengths by offsets; give it ids [rows, positions], padded with "
            "padding_idx"
        )
    counted_BT = torch.ones_like(index_BT) if module.padding_idx is None else (index_BT != module.padding_idx).long()
    g_BP = record.g.to(accumulate_dtype(record.g.dtype))
    if module.mode == "mean":
        g_BP = g_BP / counted_BT.sum(1, keepdim=True).clamp(min=1)
    factor_BT = counted_BT if weights_BT is None else counted_BT * weights_BT
    g_BTP = factor_BT.to(g_BP.dtype)[..., None] * g_BP[:, None]
    return {"weight": IndexedRows.compress(index_BT, g_BTP, module.num_embeddings)}
