"""What is measured: ``MODEL[/LAYERS][@ROWSxTOKENS]:SIDE``, as given on the command line.

Sides: ``plain-fsdp1`` and ``plain-fsdp2``; ours on FSDP2 with ``flat``, ``block`` or ``layer`` clipping, on FSDP1 as
``flat-fsdp1``; ``opacus`` (ghost_fsdp, its own wrapper) and ``opacus-hooks`` (per-sample gradients, not sharded).
"""

from __future__ import annotations

import dataclasses
import re

from fsdp_dp.benchmark.meshes import FULL_SHARD, Sharding
from fsdp_dp.benchmark.models import MODELS, Shape

SIDES = ("plain-fsdp1", "plain-fsdp2", "flat", "block", "layer", "flat-fsdp1", "opacus", "opacus-hooks")
COMPILED = ("plain-fsdp1", "plain-fsdp2", "flat", "block", "layer", "flat-fsdp1")
ON_ANY_MESH = ("plain-fsdp2", "flat", "block", "layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the results."""

    model: str
    shape: Shape
    side: str
    microbatches: int
    checkpointing: bool
    sharding: Sharding
    loader: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        kept = (" checkpointed" if self.checkpointing else "") + (" compiled" if self.compiled else "")
        fed = " through a loader" if self.loader else ""
        return f"{self.model}@{self.shape.rows}x{self.shape.tokens}{kept}{fed} {self.microbatches} microbatch(es)"

    @property
    def backend(self) -> str:
        return "FSDP1" if self.side.endswith("fsdp1") else "FSDP2"


def parse(
    text: str,
    *,
    microbatches: int,
    checkpointing: bool,
    sharding: Sharding,
    loader: bool = False,
    compiled: bool = False,
) -> list[Case]:
    """``llama-13b/8@2x1024:plain-fsdp2,flat`` as cases: of the model's layers the first eight.

    Raises:
        ValueError: there is no such model or side, a size is not one, or the side has no such sharding or is not compiled.
    """
    name, _, sides = text.partition(":")
    model, _, size = name.partition("@")
    known, _, layers = model.partition("/")
    if known not in MODELS:
        raise ValueError(f"case '{text}': no model '{known}'; there are {', '.join(MODELS)}")
    unknown = [side for side in sides.split(",") if side not in SIDES]
    if unknown:
        raise ValueError(f"case '{text}': no side '{unknown[0]}' after the colon; there are {', '.join(SIDES)}")
    unmeshed = [side for side in sides.split(",") if side not in ON_ANY_MESH]
    if unmeshed and sharding.name != FULL_SHARD:
        raise ValueError(
            f"case '{text}': side '{unmeshed[0]}' is measured with --sharding full_shard, found {sharding.name}; "
            f"sides of any sharding are {', '.join(ON_ANY_MESH)}"
        )
    peers = [side for side in sides.split(",") if side.startswith("opacus")]
    if peers and loader:
        raise ValueError(f"case '{text}': side '{peers[0]}' is not measured with --loader")
    written = [side for side in sides.split(",") if side not in COMPILED]
    if written and compiled:
        raise ValueError(
            f"case '{text}': side '{written[0]}' runs as it is written; sides of --compile are {', '.join(COMPILED)}"
        )
    shape = MODELS[known]
    if not re.fullmatch(r"[^/@]*(/[1-9]\d*)?(@[1-9]\d*x[1-9]\d*)?", name):
        raise ValueError(f"case '{text}': layers and size are numbers, as in {known}/2@8x128:flat")
    if layers:
        shape = dataclasses.replace(shape, layers=int(layers))
    if size:
        rows, tokens = map(int, size.split("x"))
        shape = dataclasses.replace(shape, rows=rows, tokens=tokens)
    return [
        Case(
            model=model,
            shape=shape,
            side=side,
            microbatches=microbatches,
            checkpointing=checkpointing,
            sharding=sharding,
            loader=loader,
            compiled=compiled,
        )
        for side in sides.split(",")
    ]
