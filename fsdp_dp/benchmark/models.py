"""The benchmark's models: one transformer that is Llama-like, GPT-2, RoBERTa or a vision transformer by its configuration.

Plain torch layers, so that every side runs the same modules. Rotary positions are left out of the Llama-like models:
they cost the same on all sides and would only move the ratios towards one. `MODELS` names the shapes.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A transformer and what it is trained on.

    ``rows`` of ``tokens`` are a microbatch on one GPU. Rows are ids below ``vocabulary``, or ``patches`` (numbers of a
    patch). With ``classes`` a row is told to be in one of these, from the mean over its positions; otherwise every position
    predicts an id. ``tied``: head and embedding are one weight.
    """

    layers: int
    heads: int
    width: int
    hidden: int
    vocabulary: int
    tokens: int
    rows: int
    kind: str = "llama"
    patches: int = 0
    classes: int = 0
    tied: bool = False

    @property
    def outputs(self) -> int:
        return self.classes or self.vocabulary


def _gpt2(layers: int, heads: int, width: int, rows: int) -> Shape:
    """At the setting of the book-keeping paper (arXiv 2210.00038): rows of 100 tokens."""
    return Shape(
        layers=layers, heads=heads, width=width, hidden=4 * width, vocabulary=50257, tokens=100, rows=rows, kind="gpt2",
        tied=True,
    )  # fmt: skip


MODELS = {
    "llama-tiny": Shape(layers=2, heads=2, width=32, hidden=88, vocabulary=96, tokens=16, rows=3),
    "gpt2-tiny": Shape(
        layers=2, heads=2, width=32, hidden=64, vocabulary=96, tokens=16, rows=3, kind="gpt2", tied=True
    ),
    "vit-tiny": Shape(
        layers=2, heads=2, width=32, hidden=64, vocabulary=0, tokens=17, rows=3, kind="vit", patches=24, classes=8
    ),
    "roberta-tiny": Shape(
        layers=2, heads=2, width=32, hidden=64, vocabulary=96, tokens=16, rows=3, kind="roberta", classes=2
    ),
    # As many layers as 6.7B has, and next to no arithmetic: its step is the time of the host.
    "llama-narrow": Shape(layers=32, heads=4, width=256, hidden=512, vocabulary=512, tokens=256, rows=2),
    "llama-350m": Shape(layers=24, heads=16, width=1024, hidden=2736, vocabulary=32000, tokens=1024, rows=16),
    "llama-1.3b": Shape(layers=24, heads=16, width=2048, hidden=5504, vocabulary=32000, tokens=1024, rows=16),
    "llama-6.7b": Shape(layers=32, heads=32, width=4096, hidden=11008, vocabulary=32000, tokens=1024, rows=2),
    "llama-13b": Shape(layers=40, heads=40, width=5120, hidden=13824, vocabulary=32000, tokens=1024, rows=2),
    "gpt2-small": _gpt2(layers=12, heads=12, width=768, rows=100),
    "gpt2-medium": _gpt2(layers=24, heads=16, width=1024, rows=50),
    "gpt2-large": _gpt2(layers=36, heads=20, width=1280, rows=20),
    "vit-large": Shape(
        layers=24,
        heads=16,
        width=1024,
        hidden=4096,
        vocabulary=0,
        tokens=197,
        rows=32,
        kind="vit",
        patches=768,
        classes=1000,
    ),
    "roberta-large": Shape(
        layers=24, heads=16, width=1024, hidden=4096, vocabulary=50265, tokens=256, rows=20, kind="roberta", classes=2
    ),
}


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_width, self.causal, bias = shape.width // shape.heads, not shape.classes, shape.kind != "llama"
        self.query, self.key, self.value, self.output = (
            nn.Linear(shape.width, shape.width, bias=bias) for _ in range(4)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            layer(x_BTD).unflatten(2, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GatedMlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD)))  # type: ignore[no-any-return]


def _norm(shape: Shape) -> nn.Module:
    return nn.RMSNorm(shape.width, eps=1e-5) if shape.kind == "llama" else nn.LayerNorm(shape.width)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = _norm(shape), _norm(shape)
        self.attention = Attention(shape)
        self.mlp = GatedMlp(shape) if shape.kind == "llama" else Mlp(shape)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """``forward(inputs, targets)`` returns the loss of every row ``[B]``."""

    def __init__(self, shape: Shape, *, tied: bool, checkpointing: bool) -> None:
        super().__init__()
        self.shape, self.checkpointing = shape, checkpointing
        self.embedding = (
            nn.Linear(shape.patches, shape.width) if shape.patches else nn.Embedding(shape.vocabulary, shape.width)
        )
        self.positions = nn.Embedding(shape.tokens, shape.width) if shape.kind != "llama" else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = _norm(shape)
        self.head = nn.Linear(shape.width, shape.outputs, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x_BTD = self.embedding(inputs)
        if self.positions is not None:
            places = torch.arange(inputs.shape[1], device=inputs.device)
            x_BTD = x_BTD + self.positions(places.repeat(len(inputs), 1))  # Opacus views it, so it must be contiguous
        for block in self.blocks:
            x_BTD = checkpoint(block, x_BTD, use_reentrant=False) if self.checkpointing else block(x_BTD)
        x_BTD = self.norm(x_BTD)
        logits = self.head(x_BTD.mean(1, keepdim=True) if self.shape.classes else x_BTD)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Weights of a usual size, in place, sharded or not; norm layers start as the identity."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            nn.init.normal_(parameter, std=0.02)


def batch(shape: Shape, rows: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random inputs ``[B, T]`` (``[B, T, patches]``) and targets ``[B, T]`` (classes: ``[B, 1]``)."""
    generator = torch.Generator().manual_seed(seed)
    T = shape.tokens
    targets = torch.randint(shape.outputs, (rows, 1 if shape.classes else T + 1), generator=generator).to(device)
    if not shape.classes:
        return targets[:, :-1].contiguous(), targets[:, 1:].contiguous()
    if not shape.patches:
        return torch.randint(shape.vocabulary, (rows, T), generator=generator).to(device), targets
    return torch.randn(rows, T, shape.patches, generator=generator).to(device), targets


def flops(shape: Shape) -> float:
    """Floating-point operations of the model itself in one forward and backward of a row, recomputation left out."""
    attention, mlp = 4 * shape.width**2, (3 if shape.kind == "llama" else 2) * shape.width * shape.hidden
    mixing = (1 if shape.classes else 0.5) * 2 * shape.tokens * shape.width
    per_token = shape.layers * (attention + mlp + mixing) + shape.patches * shape.width
    head = shape.width * shape.outputs * (1 if shape.classes else shape.tokens)
    return 6.0 * (shape.tokens * per_token + head)
