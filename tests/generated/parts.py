"""The pieces of generated models: small modules ``[B, T, D] -> [B, T, D]``, each awkward in its own way.

They know nothing of the engine, and none is copied from its tests: what they have in common with real models is how
they use parameters (shared, reused, bare, without a batch, on merged or transposed rows).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import POSITIONS

WIDTH = 6
"""Even, for heads and pairs; hidden widths are odd. A row has an odd number of positions, an even one with a class token."""

NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "layer without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "none": nn.Identity,
}


class Mlp(nn.Module):
    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = NORMS[norm](), nn.Linear(WIDTH, hidden, bias), nn.Linear(hidden, WIDTH, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.down(F.gelu(self.up(self.norm(x_BTD))))


class InPlace(Mlp):
    """Outputs of layers that are changed in place, as many vision models do."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        y = self.down(F.relu(self.up(self.norm(x_BTD)), inplace=True))
        y += x_BTD
        return y.mul_(0.9)


class Attention(nn.Module):
    """Fused projections that are chunked; the heads are transposed views."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = NORMS[norm](), nn.Linear(WIDTH, 3 * WIDTH, bias), nn.Linear(WIDTH, WIDTH, bias)

    def attend(self, x_BTD: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (z.unflatten(2, (2, -1)).transpose(1, 2) for z in self.qkv(self.norm(x_BTD)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.attend(x_BTD)


class RelativeBias(Attention):
    """A table of biases over pairs of positions, looked up without a batch."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__(norm, bias, hidden)
        self.pairs = nn.Embedding(2 * POSITIONS + 3, 2)

    def forward(self, x_BTD: Tensor) -> Tensor:
        steps = torch.arange(x_BTD.shape[1])
        bias = self.pairs(steps[:, None] - steps + POSITIONS + 1).permute(2, 0, 1).unsqueeze(0)
        return x_BTD + self.attend(x_BTD, bias)


class CalledTwice(nn.Module):
    """One Linear and one norm on different inputs of different lengths."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm, self.linear = NORMS[norm](), nn.Linear(WIDTH, WIDTH, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        pooled = self.linear(self.norm(x_BTD[:, 1:] * 0.7)).mean(1, keepdim=True)
        return x_BTD + torch.tanh(self.linear(self.norm(x_BTD))) + pooled


class TiedPair(nn.Module):
    """Two Linears with one weight, two norms with one scale."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH, bias), nn.Linear(WIDTH, WIDTH, not bias)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-5)
        self.second.weight, self.norm2.weight = self.first.weight, self.norm1.weight

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.second(self.norm2(torch.tanh(self.first(self.norm1(x_BTD)))))


class Windows(nn.Module):
    """Layers on rows that are cut into windows: several entries for each row."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm, self.linear = NORMS[norm](), nn.Linear(WIDTH, WIDTH, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        windows = x_BTD.reshape(B * T // 2, 2, D) if T % 2 == 0 else x_BTD.reshape(B * T, 1, D)
        return x_BTD + torch.tanh(self.linear(self.norm(windows))).reshape(B, T, D)


class SequenceFirst(nn.Module):
    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm, self.linear = NORMS[norm](), nn.Linear(WIDTH, WIDTH, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + torch.tanh(self.linear(self.norm(x_BTD.transpose(0, 1)))).transpose(0, 1)


class Ranks(nn.Module):
    """Linears on inputs of rank 2 and of rank 4, and on a transposed view."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.row, self.pair, self.channel = nn.Linear(WIDTH, WIDTH, bias), nn.Linear(2, 2, bias), nn.Linear(1, 1, bias)
        self.norm = NORMS[norm]()

    def forward(self, x_BTD: Tensor) -> Tensor:
        h = self.norm(x_BTD)
        pairs = self.pair(h.unflatten(2, (-1, 2))).flatten(2)
        mixed = self.channel(h.mean(1, keepdim=True).transpose(1, 2)).transpose(1, 2)
        return x_BTD + torch.tanh(self.row(h[:, 0]))[:, None] + pairs * mixed


class LayerScale(nn.Module):
    """A bare scale on a branch and a bare shift, as vision transformers have."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm, self.linear = NORMS[norm](), nn.Linear(WIDTH, WIDTH, bias)
        self.gamma, self.shift = nn.Parameter(torch.full((WIDTH,), 0.5)), nn.Parameter(torch.zeros(1, 1, WIDTH))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.gamma * torch.tanh(self.linear(self.norm(x_BTD)) + self.shift)


class BareMatrices(nn.Module):
    """Bare weights in a list: `@`, `F.linear`, `einsum`, and one that is built from two others."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm = NORMS[norm]()
        self.weights = nn.ParameterList([nn.Parameter(torch.eye(WIDTH)) for _ in range(3)])
        self.left, self.right = nn.Parameter(torch.zeros(WIDTH, 2)), nn.Parameter(torch.zeros(2, WIDTH))

    def forward(self, x_BTD: Tensor) -> Tensor:
        h = torch.tanh(self.norm(x_BTD) @ self.weights[0])
        h = F.linear(h, self.weights[1]) + torch.einsum("btd,de->bte", h, self.weights[2])
        return x_BTD + F.linear(h, self.left @ self.right)


class BareMask(nn.Module):
    """A mask token that replaces some positions, and a table that the rows look up by what they hold."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.token, self.table = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(2, WIDTH))
        self.norm = NORMS[norm]()

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = torch.where(x_BTD[..., :1] > 0.3, self.token, x_BTD)
        return self.norm(hidden) + self.table[(x_BTD[..., 0] > 0).long()]


class Unused(Mlp):
    """A layer that is never called and one whose output does not reach the loss."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__(norm, bias, hidden)
        self.never, self.lost = nn.Linear(3, 5), nn.Linear(WIDTH, 3, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        self.lost(x_BTD)
        return super().forward(x_BTD) + 0 * self.lost(x_BTD).detach().sum(-1, keepdim=True)


class Gated(nn.Module):
    """Two Linears that share an input; one output is used twice, and a detached copy of it too."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm, self.gate, self.value = NORMS[norm](), nn.Linear(WIDTH, hidden), nn.Linear(WIDTH, hidden, bias)
        self.out = nn.Linear(hidden, WIDTH, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h = self.norm(x_BTD)
        gate = self.gate(input=h)
        return x_BTD + self.out(F.silu(gate) * self.value(h) + gate.detach() * 0.1 + gate.square() * 0.01)


class Convolution(nn.Module):
    """Along the positions, in groups, and a norm over groups of channels."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm, self.out = nn.GroupNorm(2, WIDTH), nn.Conv1d(WIDTH, WIDTH, 1, bias=bias)
        groups, mode = (3, "circular") if norm == "rms" else (1, "zeros")
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=groups, bias=bias, padding_mode=mode)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BDT = x_BTD.transpose(1, 2)
        return (x_BDT + self.out(torch.tanh(self.norm(self.conv(x_BDT))))).transpose(1, 2)


class Image(nn.Module):
    """A row as an image of one channel."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, hidden, 3, padding="same", bias=bias), nn.Conv2d(hidden, 1, (1, 3), (1, 2))
        self.norm, self.mix = nn.GroupNorm(1, hidden), nn.Linear((WIDTH - 1) // 2, WIDTH, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h = F.gelu(self.norm(self.conv(x_BTD[:, None])))
        return x_BTD + self.mix(self.out(h).squeeze(1))


class OwnNorm(nn.Module):
    """A leaf module that no library knows, with a parameter of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.power = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * self.scale
        return y + torch.tanh(y) * self.power[0] + self.power[1]


class Leaves(nn.Module):
    """Leaf modules of one's own, one of them called twice."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.linear = OwnNorm(), OwnNorm(), nn.Linear(WIDTH, WIDTH, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.norm2(torch.tanh(self.linear(self.norm1(x_BTD)))) * self.norm1(x_BTD[:, :1])


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention`, which uses its parameters without calling its layers."""

    def __init__(self, norm: str, bias: bool, hidden: int) -> None:
        super().__init__()
        self.norm, self.attention = NORMS[norm](), nn.MultiheadAttention(WIDTH, 2, bias=bias, batch_first=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h = self.norm(x_BTD)
        return x_BTD + self.attention(h, h, h, need_weights=False)[0]


KINDS: dict[str, type[nn.Module]] = {
    "mlp": Mlp,
    "in place": InPlace,
    "attention": Attention,
    "relative bias": RelativeBias,
    "called twice": CalledTwice,
    "tied pair": TiedPair,
    "windows": Windows,
    "sequence first": SequenceFirst,
    "ranks": Ranks,
    "layer scale": LayerScale,
    "bare matrices": BareMatrices,
    "bare mask": BareMask,
    "unused": Unused,
    "gated": Gated,
    "convolution": Convolution,
    "image": Image,
    "leaves": Leaves,
    "torch attention": TorchAttention,
}
