"""The oracle: what a private step must do, as a float64 loop over rows, and small awkward models to try it on.

Nothing here knows the engine: this file imports nothing from `fsdp_dp`. A row's gradient comes from a forward and a
backward of that row alone; it is scaled to the bound, added, divided by the expected batch size, and given to a torch
optimizer. `Case` pairs a model with its rows; `CASES` names all of them, so that ranks can build them by name.

Legend: N rows of a logical batch, B rows of a microbatch, T positions, D channels, V vocabulary.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

Gradients = dict[str, Tensor]
Rows = tuple[Tensor, Tensor]  # inputs [N, ...] and targets [N, ...]

# Prime, and so divisible by no number of ranks.
WIDTH, HIDDEN, VOCABULARY, POSITIONS = 7, 37, 13, 5

# ------------------------------------------------------------------------------------------------------- the loop


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by the name that the bare model gives them; a tied one has its first name only."""
    return {bare_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    return re.sub(r"_(fsdp|checkpoint)_wrapped_module\.", "", name)


def row_gradients(model: nn.Module, rows: Rows, row_losses: Callable[[Any, Tensor], Tensor]) -> Iterator[Gradients]:
    """The gradient of every row's loss, float64, each from a forward of that row alone."""
    parameters = trainable(model)
    inputs, targets = rows
    for i in range(len(inputs)):
        loss = row_losses(model(inputs[i : i + 1]), targets[i : i + 1]).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        yield {name: _or_zeros(g, p) for (name, p), g in zip(parameters.items(), found, strict=True)}


def row_gradients_of_one_forward(
    model: nn.Module, rows: Rows, row_losses: Callable[[Any, Tensor], Tensor]
) -> Iterator[Gradients]:
    """As `row_gradients`, but from one forward of all rows: for dropout, whose masks depend on the batch's shape."""
    parameters = trainable(model)
    losses_N = row_losses(model(rows[0]), rows[1])
    for loss in losses_N:
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        yield {name: _or_zeros(g, p) for (name, p), g in zip(parameters.items(), found, strict=True)}


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float64) if gradient is None else gradient.double()


def norm(gradients: Gradients) -> float:
    """The norm over all parameters together."""
    return float(sum(g.double().square().sum() for g in gradients.values())) ** 0.5


def clipped_sum(gradients: Iterator[Gradients], max_grad_norm: float) -> Gradients:
    """`sum_i min(1, R / |G_i|) G_i`."""
    total: Gradients = {}
    for of_row in gradients:
        factor = min(1.0, max_grad_norm / max(norm(of_row), 1e-300))
        for name, g in of_row.items():
            total[name] = total.get(name, torch.zeros_like(g)) + factor * g
    return total


CLIP_FACTORS: dict[str, Callable[[float, float], float]] = {
    "abadi": lambda n, bound: min(1.0, bound / max(n, 1e-300)),
    "automatic": lambda n, bound: bound / (n + 0.01),
    "normalized": lambda n, bound: bound / n if n > 0 else 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Clipping in groups: how parameters are put together, how the bound is divided, how a row is scaled to it.

    ``blocks`` says which submodules are blocks, for "block"; a dict of patterns is written as a tuple of pairs.
    """

    clipping: str | tuple[tuple[str, str], ...] = "flat"
    bounds: str = "uniform"
    clip_function: str = "abadi"

    def members(self, model: nn.Module, is_block: Callable[[nn.Module, nn.Module], bool]) -> list[list[str]]:
        """The names of each group's parameters."""
        groups: dict[str, list[str]] = {}
        for name in trainable(model):
            groups.setdefault(self._key(name, model, is_block), []).append(name)
        return list(groups.values())

    def _key(self, name: str, model: nn.Module, is_block: Callable[[nn.Module, nn.Module], bool]) -> str:
        if not isinstance(self.clipping, str):
            return next(group for pattern, group in self.clipping if fnmatch.fnmatch(name, pattern))
        path = name.split(".")[:-1]
        if self.clipping == "block":
            inside = [
                i for i in range(1, len(path) + 1)
                if is_block(model.get_submodule(".".join(path[: i - 1])), model.get_submodule(".".join(path[:i])))
            ]  # fmt: skip
            return ".".join(path[: inside[0]]) if inside else ""
        return {"flat": "", "layer": ".".join(path), "parameter": name}[self.clipping]

    def clipped_sum(
        self, rows: Iterator[Gradients], members: list[list[str]], max_grad_norm: float, numel: dict[str, int]
    ) -> Gradients:
        """`sum_i` of every row's gradient, each group scaled to its own bound."""
        total: Gradients = {}
        sizes = [sum(numel[n] for n in names) if self.bounds == "dimension" else 1 for names in members]
        for of_row in rows:
            for names, size in zip(members, sizes, strict=True):
                bound = max_grad_norm * (size / sum(sizes)) ** 0.5
                factor = CLIP_FACTORS[self.clip_function](norm({n: of_row[n] for n in names}), bound)
                for n in names:
                    total[n] = total.get(n, torch.zeros_like(of_row[n])) + factor * of_row[n]
        return total


def is_unit(parent: nn.Module, module: nn.Module) -> bool:
    """Blocks as the sharded tests have them."""
    return isinstance(module, Unit)


def is_listed(parent: nn.Module, module: nn.Module) -> bool:
    """Blocks of a model that is not sharded."""
    return isinstance(parent, nn.ModuleList | nn.Sequential)


def relative_error(found: Gradients, expected: Gradients) -> float:
    """The worst over parameters of |found - expected| / |expected|; against 1/1000 of the whole where that is more.

    (A key's bias has a gradient of zero but for rounding: it can only be measured against the whole.)
    """
    assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
    floor = 1e-3 * norm(expected)
    return max(float((found[n].double() - e).norm()) / max(float(e.norm()), floor) for n, e in expected.items())


# ---------------------------------------------------------------------------------------------------- logical batches


def share(
    rows: Sequence[int], *, rank: int, size: int, microbatch: int, empty_last: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """The microbatches of one rank: row numbers [B] and a mask [B], as many on every rank.

    Rows are dealt round; padding repeats row 0, so that a mask that is ignored shows. With `empty_last`, the last of
    several ranks has padding only.
    """
    takers = size - 1 if empty_last and size > 1 else size
    mine = list(rows[rank::takers]) if rank < takers else []
    count = max(1, -(-len(rows) // (takers * microbatch)))
    numbers = torch.tensor(mine + [rows[0]] * (count * microbatch - len(mine)))
    mask = torch.arange(count * microbatch) < len(mine)
    return list(zip(numbers.split(microbatch), mask.split(microbatch), strict=True))


def rows_of_step(rows: int, step: int) -> list[int]:
    """The row numbers of logical batch `step`; all of them in the first."""
    return [i for i in range(rows) if step == 0 or (i + step) % 3]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=1.0),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    # A large eps: with the usual one, Adam blows the rounding of vanishing gradients up to whole steps.
    "adamw": functools.partial(torch.optim.AdamW, lr=0.1, eps=1e-3, weight_decay=0.1),
}

# ------------------------------------------------------------------------------------------------------------- losses


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of each row, the mean over its positions."""
    logits = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    return F.cross_entropy(logits.transpose(1, 2), targets_BT, reduction="none").mean(1)


def losses_of_four(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """As `token_losses`, of the first four positions."""
    return token_losses(logits_BTV, targets_BT[:, :4])


def square_losses(outputs: Any, targets_BK: Tensor) -> Tensor:
    """Squared distance of each row's outputs, whatever their structure, from its targets."""
    flat = torch.cat([x.flatten(1) for x in _leaves(outputs)], 1)
    wide = flat if flat.dtype == torch.float64 else flat.float()
    return (wide - targets_BK[:, :1].to(wide.dtype)).square().mean(1)


def linear_losses(outputs_BTP: Tensor, slopes_BTP: Tensor) -> Tensor:
    """`sum_t g_t . y_t`: the output gradients are the targets themselves, exactly."""
    wide = outputs_BTP if outputs_BTP.dtype == torch.float64 else outputs_BTP.float()
    return (wide * slopes_BTP.to(wide.dtype)).flatten(1).sum(1)


def _leaves(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _leaves(value)


# ------------------------------------------------------------------------------------------------------------- models


class Unit(nn.Module):
    """A module that the tests wrap as an FSDP unit of its own; the root is the last unit."""


class Attention(nn.Module):
    """Causal attention with separate projections, so that tensor parallelism can split it by head."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        inner = heads * head_width
        self.q, self.k = nn.Linear(width, inner), nn.Linear(width, inner)
        self.v, self.o = nn.Linear(width, inner, bias=False), nn.Linear(inner, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (f(x_BTD).unflatten(2, (-1, self.head_width)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(Unit):
    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads=2, head_width=3)
        self.norm2, self.fc1, self.fc2 = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.norm1(x_BTD)))
        return x_BTD + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x_BTD)))))


class Decoder(nn.Module):
    """A small language model; position ids are expanded, so they have stride 0."""

    def __init__(
        self,
        *,
        tied: bool = False,
        checkpointed: bool = False,
        dropout: float = 0.0,
        width: int = WIDTH,
        hidden: int = HIDDEN,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(POSITIONS, width)
        self.blocks = nn.ModuleList(Block(width, hidden, dropout) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        position_ids = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand(ids_BT.shape)
        x_BTD = self.token(ids_BT) + self.position(position_ids)
        for block in self.blocks:
            x_BTD = checkpoint(block, x_BTD, use_reentrant=False) if self.checkpointed else block(x_BTD)
        return self.head(self.norm(x_BTD))


class FourPositions(Decoder):
    """The decoder on the first four positions: sequence parallelism wants them divisible."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        return super().forward(ids_BT[:, :4])


class Stage(Unit):
    """Linear, norm, activation; the activation works in place, as many vision models' do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm, self.relu = nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.linear(x)))


class Mlp(nn.Module):
    """For inputs of any rank of at least 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(Stage(WIDTH, 13), Stage(13, HIDDEN))
        self.head = nn.Linear(HIDDEN, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x))


class InPlace(Unit):
    """Outputs of Linear and Embedding that are changed in place, and an input that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.fc1, self.fc2 = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 11), nn.Linear(POSITIONS, 3)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.token(ids_BT).mul_(2)
        y = F.relu(self.fc1(x), inplace=True)
        z = self.fc2(y.transpose(1, 2))
        z += 1.0
        return z.tanh()


class Embeddings(nn.Module):
    """Every form of index: padding, transposed and expanded storage, ranks 1 to 3, repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
        self.position, self.first = nn.Embedding(POSITIONS, WIDTH), nn.Embedding(VOCABULARY, WIDTH, padding_idx=-1)
        self.pair = nn.Embedding(3, WIDTH)
        self.mix = Stage(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids_BT: Tensor) -> Tensor:
        transposed = ids_BT.t().contiguous().t()
        every_other = torch.stack([ids_BT, ids_BT], 2).flatten(1)[:, ::2]
        x = self.token(transposed) + self.token(every_other) * 0.5
        x = x + self.position(torch.arange(ids_BT.shape[1]).expand(ids_BT.shape)) + self.first(ids_BT[:, 0])[:, None]
        x = x + self.pair(torch.stack([ids_BT, ids_BT.flip(1)], 2) % 3).sum(2)
        return self.head(self.mix(x))


class Norms(Unit):
    """Layer norms over one and over two dimensions, with all, some and no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.plane, self.rms_plane = nn.LayerNorm((3, WIDTH), eps=1e-3), nn.RMSNorm((3, WIDTH))
        self.scale_only, self.no_affine = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.rms, self.rms_no_affine = nn.RMSNorm(WIDTH, eps=1e-2), nn.RMSNorm(WIDTH, elementwise_affine=False)
        self.whole_row = nn.LayerNorm((2, 3, WIDTH))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x_BSKD: Tensor) -> Tensor:
        x = self.whole_row(x_BSKD) + self.rms_plane(self.plane(x_BSKD) + 0.3)
        x = self.rms(self.no_affine(self.scale_only(x) + 0.1 * x_BSKD)) + self.rms_no_affine(x)
        return self.head(x)


class Reused(nn.Module):
    """Modules called several times in one forward, on different numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.norm, self.fc = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.token(ids_BT) + self.token(ids_BT.roll(1, 1)) * 0.5 + self.token(ids_BT[:, 2:3])
        for _ in range(3):
            x = x + self.fc(self.norm(x)) + self.fc(self.norm(x[:, 1:3] * 0.7)).mean(1, keepdim=True)
        return self.head(self.block(x) + x)


class Twice(nn.Module):
    """One unit called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.block, self.head = nn.Embedding(VOCABULARY, WIDTH), Block(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.token(ids_BT))))


class RecurrentBlock(Unit):
    """Sequence first and batch first; two layers, two directions, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, bidirectional=True, proj_size=3)
        self.gru = nn.GRU(6, WIDTH, batch_first=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_TBD, (h, c) = self.lstm(x_BTD.transpose(0, 1))
        start = h[:1].repeat(1, 1, 3)[..., :WIDTH].contiguous() + c[-1:]
        return x_BTD + self.gru(y_TBD.transpose(0, 1), start)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.block = nn.Embedding(VOCABULARY, WIDTH), RecurrentBlock()
        self.rnn, self.head = nn.RNN(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.rnn(self.block(self.token(ids_BT)))[0])


class ScaledBlock(Unit):
    """A layer scale as in vision transformers, and a gate in a list; optionally recomputed in backward."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.norm, self.lin, self.recompute = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), recompute
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.gates = nn.ParameterList([nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.ones(WIDTH, WIDTH))])

    def branch(self, x_BTD: Tensor) -> Tensor:
        hidden = self.lin(self.norm(x_BTD)) + self.gates[0]
        return (torch.tanh(hidden) @ self.gates[1]) * self.gamma

    def forward(self, x_BTD: Tensor) -> Tensor:
        branch = checkpoint(self.branch, x_BTD, use_reentrant=False) if self.recompute else self.branch(x_BTD)
        return x_BTD + branch


class Bare(nn.Module):
    """A class token, positions without a batch (a table and a bare parameter), a bias table over pairs of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.start, self.pairs = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Embedding(2 * POSITIONS + 1, 1)
        self.positions = nn.Parameter(torch.zeros(1, POSITIONS + 1, WIDTH))
        self.blocks = nn.ModuleList(ScaledBlock(recompute) for recompute in (False, True))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids_BT: Tensor) -> Tensor:
        length = ids_BT.shape[1]
        x_BTD = self.token(ids_BT) + self.position(torch.arange(length))
        x_BTD = torch.cat([self.start.expand(len(ids_BT), -1, -1), x_BTD], dim=1) + self.positions[:, : length + 1]
        steps = torch.arange(length + 1)
        bias = self.pairs(steps[:, None] - steps + length).squeeze(-1)
        x_BTD = torch.softmax(x_BTD @ x_BTD.mT + bias, -1) @ x_BTD
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD[:, 1:])


class Ask(Unit):
    """Queries of a start image that is the same for all rows: a unit that no row passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.norm = nn.Conv1d(WIDTH, WIDTH, 1), nn.GroupNorm(1, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, start_1DT: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.image(start_1DT))).mT)


class Queries(nn.Module):
    """Rows answer what was learned without them."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.start = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.zeros(1, WIDTH, POSITIONS))
        self.ask, self.head = Ask(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD, queries_1TD = self.token(ids_BT), self.ask(self.start)
        return self.head(torch.softmax(queries_1TD @ x_BTD.mT, -1) @ x_BTD + queries_1TD)


class RootMeanSquare(nn.Module):
    """As Llama's: a norm of its own, in float32 or wider."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Mixture(nn.Module):
    """Parameters of three dimensions and of one element, a frozen one, a buffer, keywords, an output unused at times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts, self.gain = nn.Parameter(torch.randn(3, width, width) / 2), nn.Parameter(torch.tensor([0.5]))
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.register_buffer("ramp", torch.linspace(0, 1, width))

    def forward(self, x_BTD: Tensor, *, gate: Tensor, table: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = torch.einsum("btd,edk,bte->btk", x_BTD, self.experts, gate.softmax(-1)) * scale
        return {"main": y + self.gain * self.ramp * self.frozen + table, "rest": [y.sin()]}


class Sorted(nn.Module):
    """What it does depends on the data, so it is run row by row; and a subclass of Linear with a forward of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / 2)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y = torch.zeros_like(x_BTD)
        rows, positions = torch.where(x_BTD[..., 0] > 0)
        if len(rows):
            y = y.index_put((rows, positions), x_BTD[rows, positions] @ self.weight)
        return y


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).tanh()


class Named(nn.Linear):
    """Computes what its base computes."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.label = "named"


class Positions(nn.Module):
    """A table that is given no tensor, and gives no rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(POSITIONS, width) / 2)

    def forward(self, length: int) -> Tensor:
        return self.table[:length]


class LeafBlock(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixture, self.router = RootMeanSquare(WIDTH), Mixture(WIDTH), nn.Linear(WIDTH, 3)
        self.sorted, self.doubled, self.named = Sorted(WIDTH), Doubled(WIDTH, WIDTH), Named(WIDTH)
        self.positions = Positions(WIDTH)

    def forward(self, x_BTD: Tensor, cheap: bool) -> Tensor:
        h = self.norm(x_BTD) + self.positions(x_BTD.shape[1])
        table = torch.linspace(-1, 1, WIDTH, dtype=h.dtype).expand(h.shape[1], WIDTH)
        mixed = self.mixture(h, gate=self.router(h), table=table, scale=0.7)
        h = mixed["main"] if cheap else mixed["main"] * mixed["rest"][0]
        return x_BTD + self.sorted(h) + self.named(self.doubled(self.norm(h)))


class Leaves(nn.Module):
    """Modules without children and without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(LeafBlock() for _ in range(2))
        self.wide = Doubled(WIDTH, 61)
        self.head = nn.Linear(61, VOCABULARY)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.blocks[1](self.blocks[0](self.token(ids_BT), cheap=True), cheap=False)
        logits = self.head(x_BTD.flatten(1).unflatten(1, (-1, WIDTH)) @ x_BTD.mT @ self.wide(x_BTD))
        return (
            logits / 300
        )  # with gradients of a thousand, three steps of the oracle blow up the last digit of its bound


class SmoothLeafBlock(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixture, self.router = RootMeanSquare(WIDTH), Mixture(WIDTH), Doubled(WIDTH, 3)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h = self.norm(x_BTD)
        mixed = self.mixture(h, gate=self.router(h), table=torch.zeros((), dtype=h.dtype))
        return x_BTD + (0.5 * mixed["main"] * mixed["rest"][0]).to(x_BTD.dtype)  # buffers are wide


class SmoothLeaves(nn.Module):
    """The same in low precision: no choice depends on the data, so rounding changes results by little."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(SmoothLeafBlock() for _ in range(2))
        self.head = Doubled(WIDTH, VOCABULARY)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.blocks[0](self.token(ids_BT))))


class Stem(Unit):
    """Convolutions of every kind of padding, stride and groups, and the norms that go with them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1, padding_mode="circular", bias=False)
        self.norm, self.depth = nn.GroupNorm(3, 6), nn.Conv2d(6, 6, (3, 1), padding="same", groups=3)
        self.lines, self.line_norm = nn.Conv1d(6, WIDTH, 3, dilation=2, padding=2), nn.InstanceNorm1d(6, affine=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.depth(F.gelu(self.norm(self.conv(x_BCHW))))
        return self.lines(self.line_norm(x.flatten(2))).mT


class Encoder(Unit):
    """torch's own layers, whose attention projects with functions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 1, 5, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 1, batch_first=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.layer(x_BTD)
        return x_BTD + self.cross(x_BTD[:, 1:], y := x_BTD.sin(), y, need_weights=False)[0].mean(1, keepdim=True)


class Vision(nn.Module):
    """Convolutions, then attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encoder, self.head = Stem(), Encoder(), nn.Linear(WIDTH, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x_BCHW)))


class Shared(nn.Module):
    """One weight in several modules: two tables and two heads, two Linears, two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.other = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH, padding_idx=2)
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False)
        self.head, self.head2 = nn.Linear(WIDTH, VOCABULARY, bias=False), nn.Linear(WIDTH, VOCABULARY)
        self.other.weight = self.head.weight = self.head2.weight = self.token.weight
        self.fc2.weight, self.norm2.weight = self.fc1.weight, self.norm1.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.token(ids_BT) + self.other(ids_BT.roll(2, 1))
        x = x + self.fc2(F.gelu(self.fc1(self.norm1(x))))
        return self.head(self.norm2(x)) + self.head2(x.roll(1, 1))


class Narrow(nn.Module):
    """Parameters with fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 5)
        self.stage = Stage(5, 3)
        self.to_one, self.from_one, self.norm = nn.Linear(3, 1), nn.Linear(1, 2), nn.RMSNorm(1, eps=0.5)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.from_one(self.norm(self.to_one(self.stage(self.table(ids_BT % 2)))))


class Branches(nn.Module):
    """Nested outputs that all reach the loss, called by keyword inside, with layers that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = Stage(WIDTH, 11), nn.Linear(11, 3), Stage(11, 5)
        self.never, self.never_unit = nn.Linear(3, 4), Stage(4, 3)

    def forward(self, x_BD: Tensor) -> dict[str, Any]:
        h = self.trunk(x_BD)
        return {"left": self.left(input=h), "rest": (self.right(h).tanh(), [h.square()])}


class Routed(nn.Module):
    """A layer that only some rows call, so that at times no row of a rank does. One row is run at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.block = nn.Embedding(VOCABULARY, WIDTH), Block()
        self.expert, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.token(ids_BT)
        if ids_BT[0, 0] % 2:
            x = x + self.expert(x)
        return self.head(self.block(x))


def wrapped_decoder() -> nn.Module:
    """Activation checkpointing by torch's wrapper module, inside the units."""
    model = Decoder()
    for block in model.blocks:
        for name in ("attention", "fc1"):
            setattr(block, name, checkpoint_wrapper(block.get_submodule(name)))
    return model


class Probe(nn.Module):
    """One Linear: with `linear_losses`, a row's gradient is `sum_t g_t a_t^T` of input and target, in any format."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear(x_BTD)


# -------------------------------------------------------------------------------------------------- adversarial rows

Kind = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # random a [T, D] and g [T, P] -> those of the row


def _cancelling_keys(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs with a large common mean under slopes that sum to nearly zero: |G| is a sliver of sum |a_t||g_t|."""
    return a[:1] * 4 + a / 16, g - g.mean(0)


def _same_rounding(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """All positions alike: rounding c * g errs the same way at each."""
    return a[:1].expand_as(a), g[:1].expand_as(g)


def _opposed_rounding(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Two near-opposite slopes under one input: what rounding adds to one it takes from the other, and |G| is small."""
    sign = torch.where(torch.arange(len(g)) % 2 == 0, 1.0, -(1 - 2.0**-5))
    return a[:1].expand_as(a), sign[:, None] * g[:1]


def _one_giant(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """One position outweighs all others."""
    weight = torch.where(torch.arange(len(g)) == 0, 256.0, 1.0)[:, None]
    return a, g * weight


PLAIN_KINDS: dict[str, Kind] = {"random": lambda a, g: (a, g), "same rounding": _same_rounding, "one giant": _one_giant}
CANCELLING_KINDS: dict[str, Kind] = {"cancelling keys": _cancelling_keys, "opposed rounding": _opposed_rounding}


def probe_rows(kinds: dict[str, Kind], *, positions: int, inputs: int, outputs: int, of_each: int = 4) -> Rows:
    """Rows for a `Probe`, exact in bfloat16, each scaled by a power of two so that its gradient's norm is in [1, 2)."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for kind in kinds.values():
        for _ in range(of_each):
            drawn = (torch.randn(positions, n, generator=generator, dtype=torch.float64) for n in (inputs, outputs))
            a, g = (x.bfloat16().double() for x in kind(*drawn))
            length = torch.cat([g.T @ a, g.sum(0)[:, None]], 1).norm()
            rows.append((a, g * 2.0 ** -length.log2().floor()))
    return torch.stack([a for a, _ in rows]), torch.stack([g for _, g in rows])


# -------------------------------------------------------------------------------------------------------------- cases


def _is_any(name: str) -> bool:
    return True


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _is_half(name: str) -> bool:
    """A unit is frozen as a whole, the other in part, and so is the root."""
    return not (name.startswith("blocks.0.") or "fc1.weight" in name or "token" in name or "k.bias" in name)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its rows and its loss. It pickles. Without `input_shape`, a row's input is token ids."""

    build: Callable[[], nn.Module]
    row_losses: Callable[[Any, Tensor], Tensor] = token_losses
    input_shape: tuple[int, ...] = ()
    rows: int = 7
    one_at_a_time: bool = False
    trainable: Callable[[str], bool] = _is_any

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in its initial state, the same on every call; values fit bfloat16 exactly."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
            for parameter in model.parameters():
                with torch.no_grad():  # norms and biases start at ones and zeros, where mistakes can hide
                    parameter.add_(torch.randn_like(parameter) * 0.1).copy_(parameter.bfloat16())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trainable(name))
        return model.to(dtype)

    def batch(self, dtype: torch.dtype = torch.float64) -> Rows:
        """All rows: inputs and targets."""
        generator = torch.Generator().manual_seed(1)
        if self.input_shape:
            inputs = torch.randn(self.rows, *self.input_shape, generator=generator).bfloat16().to(dtype)
            return inputs, torch.randn(self.rows, 1, generator=generator).to(dtype)
        ids = torch.randint(0, VOCABULARY, (2, self.rows, POSITIONS), generator=generator)
        return ids[0], ids[1]


CASES = {
    "decoder": Case(build=Decoder, rows=11),
    "even decoder": Case(build=functools.partial(Decoder, hidden=38)),
    "even width": Case(build=functools.partial(Decoder, width=8, hidden=36)),
    "four positions": Case(build=functools.partial(FourPositions, hidden=38), row_losses=losses_of_four, rows=11),
    "four positions, tied": Case(
        build=functools.partial(FourPositions, hidden=38, tied=True), row_losses=losses_of_four
    ),
    # A table so large that its gradient is kept in factors; in the other tied models it is formed.
    "tied": Case(build=functools.partial(Decoder, tied=True, vocabulary=61), rows=11),
    "checkpointed": Case(build=functools.partial(Decoder, checkpointed=True)),
    "checkpoint wrapper": Case(build=wrapped_decoder),
    "tied checkpointed": Case(build=functools.partial(Decoder, tied=True, checkpointed=True)),
    "partly frozen": Case(build=Decoder, trainable=_is_half),
    "biases only": Case(build=Decoder, trainable=_is_bias),
    "inputs of rank 2": Case(build=Mlp, row_losses=square_losses, input_shape=(WIDTH,)),
    "inputs of rank 3": Case(build=Mlp, row_losses=square_losses, input_shape=(4, WIDTH)),
    "inputs of rank 4": Case(build=Mlp, row_losses=square_losses, input_shape=(2, 3, WIDTH)),
    "in place": Case(build=InPlace, row_losses=square_losses),
    "embeddings": Case(build=Embeddings),
    "norms": Case(build=Norms, row_losses=square_losses, input_shape=(2, 3, WIDTH)),
    "reused": Case(build=Reused),
    "unit called twice": Case(build=Twice),
    "shared weights": Case(build=Shared),
    "bare parameters": Case(build=Bare),
    "queries": Case(build=Queries),
    "leaf modules": Case(build=Leaves),
    "recurrent": Case(build=Recurrent),
    "vision": Case(build=Vision, row_losses=square_losses, input_shape=(2, 4, 6)),
    "fewer rows than ranks": Case(build=Narrow, row_losses=square_losses),
    "routed": Case(build=Routed, one_at_a_time=True),
    "branches": Case(build=Branches, row_losses=square_losses, input_shape=(WIDTH,)),
}


def _probe(kinds: dict[str, Kind], *, positions: int, inputs: int, outputs: int) -> tuple[Case, Rows]:
    case = Case(build=functools.partial(Probe, inputs, outputs), row_losses=linear_losses)
    return case, probe_rows(kinds, positions=positions, inputs=inputs, outputs=outputs)


# Norms of long rows are cheapest from the gradient itself, those of short and wide ones from two Gram matrices.
LONG, WIDE = {"positions": 64, "inputs": 24, "outputs": 20}, {"positions": 6, "inputs": 64, "outputs": 48}
PRECISION_ROWS: dict[str, Callable[[], tuple[Case, Rows]]] = {
    "plain long": functools.partial(_probe, PLAIN_KINDS, **LONG),
    "plain wide": functools.partial(_probe, PLAIN_KINDS, **WIDE),
    "cancelling long": functools.partial(_probe, CANCELLING_KINDS, **LONG),
    "cancelling wide": functools.partial(_probe, CANCELLING_KINDS, **WIDE),
    "decoder": lambda: (CASES["decoder"], CASES["decoder"].batch()),
    "tied": lambda: (CASES["tied"], CASES["tied"].batch()),
    "norms": lambda: (CASES["norms"], CASES["norms"].batch()),
    "bare parameters": lambda: (CASES["bare parameters"], CASES["bare parameters"].batch()),
    "leaves": lambda: (case := Case(build=SmoothLeaves), case.batch()),
}
"""Rows whose every contribution is weighed, in low precision."""


@functools.cache
def median_norm(name: str) -> float:
    """A bound that clips half of the rows."""
    case = CASES[name]
    norms = [norm(g) for g in row_gradients(case.model(), case.batch(), case.row_losses)]
    bound = float(torch.tensor(norms, dtype=torch.float64).median())
    assert min(norms) < bound < max(norms), f"case '{name}': all rows have one norm"
    return bound


@functools.cache
def trained(
    name: str,
    *,
    steps: int,
    optimizer: str,
    expected_batch_size: int,
    groups: Groups | None = None,
    is_block: Callable[[nn.Module, nn.Module], bool] = is_unit,
) -> Gradients:
    """How far `steps` releases without noise move every parameter, clipped at the median norm."""
    case = CASES[name]
    model, (inputs, targets) = case.model(), case.batch()
    groups = Groups() if groups is None else groups
    members, numel = groups.members(model, is_block), {n: p.numel() for n, p in trainable(model).items()}
    start = {n: p.detach().clone() for n, p in trainable(model).items()}
    stepper = OPTIMIZERS[optimizer](model.parameters())
    for step in range(steps):
        numbers = rows_of_step(case.rows, step)
        gradients = row_gradients(model, (inputs[numbers], targets[numbers]), case.row_losses)
        total = groups.clipped_sum(gradients, members, median_norm(name), numel)
        for n, p in trainable(model).items():
            p.grad = total[n] / expected_batch_size
        stepper.step()
    return {n: p.detach() - start[n] for n, p in trainable(model).items()}
