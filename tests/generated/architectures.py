"""Models drawn from a seed: `draw(seed)` is an `Architecture`, which says in one line all that there is to know of it.

An architecture builds its model, its rows and its loss; with how it is trained it makes one case of the comparison
with the oracle. Every choice comes from the seed, so that a failure is found again by its number.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.generated.parts import KINDS, NORMS, WIDTH
from tests.oracle import (
    POSITIONS,
    VOCABULARY,
    Case,
    Groups,
    Unit,
    is_unit,
    square_losses,
    token_losses,
)

RECOMPUTE = ("none", "around", "inside", "selective")
SAVED = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One piece of a model: its `kind` of `parts`, and how it is placed."""

    kind: str
    norm: str = "layer"
    bias: bool = True
    hidden: int = 7
    unit: bool = True
    recompute: str = "none"
    times: int = 1


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model, what of it is trained, in which format, on how many rows, and how these are dealt to ranks."""

    seed: int
    inputs: str  # "ids" or "vectors"
    positions: str  # "none", "expanded table", "bare table", "bare parameter"
    class_token: bool
    parts: tuple[Part, ...] = field(repr=False)
    head: str  # "plain", "tied", "nested"
    trainable: str  # "all", "some", "biases", "head and norms"
    dtype: str  # "float64", "float32", "bf16"
    rows: int
    microbatch: int
    empty_last: bool
    loss_reduction: str
    steps: int
    root_only: bool
    clipping: str
    clip_function: str

    def __str__(self) -> str:
        return "\n    ".join([repr(self), *map(repr, self.parts)])

    @property
    def groups(self) -> Groups:
        return Groups(clipping=self.clipping, clip_function=self.clip_function)

    def is_block(self, parent: nn.Module, module: nn.Module) -> bool:
        """Blocks are FSDP's units."""
        return not self.root_only and is_unit(parent, module)

    def case(self) -> Case:
        """For the oracle."""
        ids = self.inputs == "ids"
        return Case(
            build=functools.partial(Generated, self),
            row_losses=token_losses if self.head != "nested" and ids else square_losses,
            input_shape=() if ids else (POSITIONS, WIDTH),
            rows=self.rows,
            trainable=functools.partial(_is_trained, self.trainable, self.seed),
        )


def draw(seed: int) -> Architecture:
    """The architecture with this number."""
    pick = random.Random(seed)
    inputs = pick.choice(["ids", "ids", "vectors"])
    positions = ["none", "expanded table", "bare table", "bare parameter"]
    trainable = pick.choice(["all", "all", "all", "some", "some", "biases", "head and norms"])
    rows = pick.randint(3, 8)
    class_token = pick.random() < 0.3
    # Windows of 2 positions are not told apart from 2 rows behind their positions: such a microbatch is refused.
    microbatch = pick.choice([1, 3, 4] if class_token else [1, 2, 3, 4])
    # The mixed-precision backends have a unit for each block.
    dtypes = ["float64", "float64", "float64", "float32", "bf16"]
    return Architecture(
        seed=seed,
        inputs=inputs,
        positions=pick.choice(positions),
        class_token=class_token,
        parts=tuple(_draw_part(pick) for _ in range(pick.randint(1, 4))),
        head=pick.choice(["plain", "tied", "nested"] if inputs == "ids" else ["plain", "nested"]),
        trainable=trainable,
        dtype=(dtype := pick.choice(dtypes)),
        rows=rows,
        microbatch=microbatch,
        empty_last=pick.random() < 0.25,
        loss_reduction=pick.choice(["mean", "sum"]),
        steps=pick.choice([1, 1, 2]),
        root_only=pick.random() < 0.2 and dtype != "bf16",
        # Whether a unit with nothing to train is a block is no matter of these tests.
        clipping=pick.choice(
            ["flat", "flat", "block", "layer", "parameter"] if trainable == "all" else ["flat", "layer"]
        ),
        clip_function=pick.choice(["abadi", "abadi", "automatic"]),
    )


def _draw_part(pick: random.Random) -> Part:
    kind = pick.choice(list(KINDS))
    # torch refuses to change in place what selective checkpointing keeps.
    recompute = [mode for mode in RECOMPUTE if (kind, mode) != ("in place", "selective")]
    return Part(
        kind=kind,
        norm=pick.choice(list(NORMS)),
        bias=pick.random() < 0.7,
        hidden=pick.choice([1, 3, 7, 13, 31]),
        unit=pick.random() < 0.7,
        recompute=pick.choice(recompute) if pick.random() < 0.5 else "none",
        times=2 if pick.random() < 0.2 else 1,
    )


def _is_trained(which: str, seed: int, name: str) -> bool:
    if which == "biases":
        return name.endswith("bias")
    if which == "head and norms":
        return "head" in name or "norm" in name
    return which == "all" or "head" in name or random.Random(f"{seed} {name}").random() < 0.5


class Enclosed(Unit):
    """A part as an FSDP unit of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.inner(x_BTD)


def _place(part: Part) -> nn.Module:
    module = KINDS[part.kind](part.norm, part.bias, part.hidden)
    if part.recompute == "inside":
        module = checkpoint_wrapper(module)
    return Enclosed(module) if part.unit else module


def _called(part: Part, module: nn.Module) -> Callable[[Tensor], Tensor]:
    if part.recompute == "around":
        return functools.partial(checkpoint, module, use_reentrant=False)
    if part.recompute == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, SAVED)
        return functools.partial(checkpoint, module, use_reentrant=False, context_fn=contexts)
    return module


class Generated(nn.Module):
    """The model of an architecture."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.of = of
        if of.inputs == "ids":
            self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=2 if of.seed % 2 else None)
        else:
            self.stem = nn.Linear(WIDTH, WIDTH)
        if "table" in of.positions:
            self.places = nn.Embedding(POSITIONS, WIDTH)
        if of.positions == "bare parameter":
            self.places = nn.Parameter(torch.zeros(1, POSITIONS, WIDTH))
        if of.class_token:
            self.start = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.parts = nn.ModuleList(map(_place, of.parts))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=of.head != "tied")
        if of.head == "tied":
            self.head.weight = self.tokens.weight

    def embed(self, x: Tensor) -> Tensor:
        h_BTD = self.tokens(x) if self.of.inputs == "ids" else self.stem(x)
        steps = torch.arange(POSITIONS)
        if self.of.positions == "expanded table":
            h_BTD = h_BTD + self.places(steps.expand(h_BTD.shape[:2]))
        elif self.of.positions == "bare table":
            h_BTD = h_BTD + self.places(steps)
        elif self.of.positions == "bare parameter":
            h_BTD = h_BTD + self.places[:, : h_BTD.shape[1]]
        if self.of.class_token:
            h_BTD = torch.cat([self.start.expand(len(h_BTD), -1, -1), h_BTD], dim=1)
        return h_BTD

    def forward(self, x: Tensor) -> Any:
        h_BTD = self.embed(x)
        for part, module in zip(self.of.parts, self.parts, strict=True):
            for _ in range(part.times):
                h_BTD = _called(part, module)(h_BTD)
        h_BTD = h_BTD[:, 1:] if self.of.class_token else h_BTD
        logits = self.head(self.norm(h_BTD))
        return (
            {"logits": logits, "more": (h_BTD.mean(1), [logits[:, 0].tanh()])} if self.of.head == "nested" else logits
        )
