"""A decoder in Llama's layout: RMSNorm, rotary positions, grouped key and value heads, SwiGLU, no biases; torch alone.

Its layers have the names of `gpt`'s, and follow the same three choices for private training and tensor parallelism.

Shapes: B samples, T positions, C features (`width`), H heads (on this rank), K features per head, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.gpt import EMBEDDING_STD, make_norm

ROTARY_BASE = 10_000.0


def rotary_table(positions: int, head_width: int) -> Tensor:
    """cos and sin of the angles ``t / base^(2k / K)`` (arXiv 2104.09864, eq. 15), float32 ``[2, T, K / 2]``."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles_TK = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles_TK.cos(), angles_TK.sin()])


def rotate(x_BHTK: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (k, k + K / 2) of every position by its angles, in float32 or wider."""
    cos_TK, sin_TK = table[:, : x_BHTK.shape[2]]
    first, second = x_BHTK.to(torch.promote_types(x_BHTK.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat([first * cos_TK - second * sin_TK, second * cos_TK + first * sin_TK], dim=-1)
    return turned.to(x_BHTK.dtype)


class Attention(nn.Module):
    """Causal self-attention in which groups of heads share a key and a value: x_BTC -> y_BTC."""

    rotary: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        shared_width = config.shared_heads * self.head_width
        self.grouped = config.shared_heads < config.heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, shared_width, bias=False)
        self.value = nn.Linear(config.width, shared_width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.register_buffer("rotary", rotary_table(config.block_size, self.head_width), persistent=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        query, key, value = (self.split_heads(layer(x_BTC)) for layer in (self.query, self.key, self.value))
        query, key = rotate(query, self.rotary), rotate(key, self.rotary)
        y_BHTK = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        return self.output(y_BHTK.transpose(1, 2).flatten(2))

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        """x_BTC -> x_BHTK; H is inferred, for under tensor parallelism a rank holds some of the heads."""
        return x_BTC.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202), position by position: x_BTC -> y_BTC."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTC)) * self.up(x_BTC))


class Block(nn.Module):
    """Attention, then MLP, each on the normalised input and added to the residual stream: x_BTC -> y_BTC."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC)))
        return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC)))


class Llama(nn.Module):
    """The decoder: int64 tokens_BT -> logits_BTV; position t sees tokens 0..t and predicts token t + 1.

    After `to_empty` of a model made on the meta device, call `initialize`: it also fills the rotary tables.

    Raises:
        ValueError: in forward, when T is more than `config.block_size`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        initialize(self)
        if config.embeddings == "tied":
            self.head.weight = self.token_embedding.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        length = tokens_BT.shape[1]
        if length > self.config.block_size:
            raise ValueError(
                f"Llama: found {length} tokens per row, expected at most {self.config.block_size}; raise model.block_size"
            )
        x_BTC = self.token_embedding(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))


@torch.no_grad()
def initialize(model: Llama) -> None:
    """Normals of 0.02, residual projections shrunk by sqrt(2 layers), norms one; the data never enters."""
    residual_std = EMBEDDING_STD / math.sqrt(2 * model.config.layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=residual_std if name.endswith(("output", "down")) else EMBEDDING_STD)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, Attention):
            module.rotary.copy_(rotary_table(model.config.block_size, module.head_width))
