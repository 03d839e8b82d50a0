"""What is claimed to work, as data (the README's table is written from it), and each claim run on four ranks."""

from pathlib import Path

import pytest
import torch

from tests.distributed.backends import Training, disagreements, fail_if_any, played
from tests.oracle import Groups

SUPPORT: dict[str, tuple[str, tuple[str, ...]]] = {
    "FSDP1 FULL_SHARD": ("fsdp1", ("fp64", "fp32", "bf16")),
    "FSDP1 SHARD_GRAD_OP": ("fsdp1 shard_grad_op", ("fp64", "fp32", "bf16")),
    "FSDP1 NO_SHARD": ("fsdp1 no_shard", ("fp64", "fp32", "bf16")),
    "FSDP1 HYBRID_SHARD": ("fsdp1 hybrid", ("fp64", "fp32", "bf16")),
    "FSDP1 _HYBRID_SHARD_ZERO2": ("fsdp1 hybrid zero2", ("fp64", "fp32", "bf16")),
    "FSDP2": ("fsdp2", ("fp64", "fp32", "bf16")),
    "FSDP2 on a (replicate, shard) mesh": ("fsdp2 hybrid", ("fp64", "fp32", "bf16")),
    "FSDP2 + tensor parallel": ("tp 2x2", ("fp64", "fp32", "bf16")),
    "FSDP2 + tensor and sequence parallel": ("sp 2x2", ("fp64", "fp32", "bf16")),
    "DDP": ("ddp", ("fp64", "fp32")),
    "DDP + ZeroRedundancyOptimizer": ("zero1", ("fp64", "fp32")),
}
"""Strategy -> what `BACKENDS` calls it, and the formats of forward and backward (bf16: with float32 parameters)."""

GROUPS = ("flat", "block", "layer", "parameter")
README = Path(__file__).parents[2] / "README.md"


def training(strategy: str, precision: str, clipping: str) -> Training:
    backend = SUPPORT[strategy][0] + (" bf16" if precision == "bf16" else "")
    dtype = torch.float64 if precision == "fp64" else torch.float32
    return Training(
        case="four positions", backend=backend, groups=Groups(clipping=clipping), dtype=dtype, empty_last=True
    )


def table() -> str:
    """The support matrix in Markdown."""
    lines = ["| strategy | forward and backward in | clipping groups |", "|---|---|---|"]
    lines += [f"| {name} | {', '.join(formats)} | {', '.join(GROUPS)} |" for name, (_, formats) in SUPPORT.items()]
    return "\n".join(lines)


def test_the_readme_claims_what_is_run_here() -> None:
    assert table() in README.read_text(encoding="utf-8"), f"README.md should have\n{table()}"


PAIRWISE = [
    training(strategy, formats[(i + j) % len(formats)], group)
    for i, (strategy, (_, formats)) in enumerate(SUPPORT.items())
    for j, group in enumerate(GROUPS)
]
"""Every strategy in every group and in every format, every format in every group."""


def test_every_pair_of_strategy_precision_and_group() -> None:
    fail_if_any(disagreements(played(4, PAIRWISE)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SUPPORT)
def test_every_claim(strategy: str) -> None:
    tasks = [training(strategy, precision, group) for precision in SUPPORT[strategy][1] for group in GROUPS]
    fail_if_any(disagreements(played(4, tasks)))
