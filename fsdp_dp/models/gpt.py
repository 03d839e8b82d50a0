"""A decoder-only transformer (GPT-2's layout), written to be read, to be trained privately and to be split over ranks.

Three choices serve private training and tensor parallelism; the rest is the textbook:

- only `Linear`, `Embedding` and norm modules own parameters, so that each per-sample gradient has a known form;
- the input of every layer has the batch as its first dimension, position ids included: they are expanded to one row
  per sample, or the engine could not tell the samples of the position embedding apart;
- queries, keys and values are separate `Linear`s, and the number of heads is read off the tensor that they return, so
  that a rank that holds half of the features sees half of the heads.

Shapes: B samples, T positions, C features (`width`), H heads (on this rank), K features per head, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp.models.config import GPTConfig

EMBEDDING_STD = 0.02


def make_norm(config: GPTConfig) -> nn.Module:
    """The normalisation that `config.norm` names, over the features."""
    return {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[config.norm](config.width)


class Attention(nn.Module):
    """Causal multi-head self-attention: x_BTC -> y_BTC."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        query, key, value = (self.split_heads(layer(x_BTC)) for layer in (self.query, self.key, self.value))
        y_BHTK = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(y_BHTK.transpose(1, 2).flatten(2))

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        """x_BTC -> x_BHTK; H is inferred, for under tensor parallelism a rank holds some of the heads."""
        return x_BTC.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class MLP(nn.Module):
    """Two Linears with a GELU between them, position by position: x_BTC -> y_BTC."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTC)))


class Block(nn.Module):
    """Attention, then MLP, each on the normalised input and added to the residual stream: x_BTC -> y_BTC.

    One FSDP unit: the application shards the model block by block.
    """

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


class GPT(nn.Module):
    """The decoder: int64 tokens_BT -> logits_BTV; position t sees tokens 0..t and predicts token t + 1.

    Raises:
        ValueError: in forward, when T is more than `config.block_size`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.block_size, config.width)
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
                f"GPT: found {length} tokens per row, expected at most {self.config.block_size}; raise model.block_size"
            )
        positions_BT = torch.arange(length, device=tokens_BT.device).expand_as(tokens_BT)
        x_BTC = self.token_embedding(tokens_BT) + self.position_embedding(positions_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))


@torch.no_grad()
def initialize(model: GPT) -> None:
    """GPT-2's initialisation: normals of 0.02, residual projections shrunk by sqrt(2 layers), biases zero.

    Data never enters: an initialisation fitted to the training text would leak it outside the noise.
    """
    residual_std = EMBEDDING_STD / math.sqrt(2 * model.config.layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=residual_std if name.endswith(("output", "down")) else EMBEDDING_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
