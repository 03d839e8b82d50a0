"""Embedding: the gradient of a row touches only the table rows that the sample looked up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fsdp_dp.gradients import IndexedRows, PerSampleGradient
from fsdp_dp.layers.linear import positions
from fsdp_dp.layers.registry import layer_rule


def _check(module: nn.Module) -> str | None:
    assert isinstance(module, nn.Embedding)
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True divides by counts over the whole batch, which couples rows; set it to False"
    if module.max_norm is not None:
        return "max_norm rewrites the table in forward according to the data, un-noised; set max_norm=None"
    if module.sparse:
        return "sparse=True asks for sparse gradients, but noise is dense; set sparse=False"
    return None


@layer_rule(nn.Embedding, check=_check)
def embedding(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    assert isinstance(module, nn.Embedding)
    index_BT, g_BTP = a.reshape(a.shape[0], -1).long(), positions(g)
    if module.padding_idx is not None:
        g_BTP = torch.where((index_BT == module.padding_idx)[..., None], 0, g_BTP)
    return {"weight": IndexedRows.compress(index_BT, g_BTP, module.num_embeddings)}
