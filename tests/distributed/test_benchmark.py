"""The benchmark's sides do the same work: in float32 and without noise, Opacus' gradient is ours; a failure is a row."""

import argparse
import json
import os
import sys
import time
import warnings
import zlib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fsdp_dp.benchmark import __main__ as benchmark
from fsdp_dp.benchmark import cases, measure, meshes, peers, sides
from tests.distributed.backends import quiet_torch
from tests.distributed.harness import run

CPU = torch.device("cpu")
ALL = meshes.parse("full_shard", 2)


@torch.no_grad()
def named_weights(model: nn.Module) -> None:
    """The same weights whether or not they are sharded, out of their names."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("_module.module.").encode()))
        whole = 0.3 * torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.copy_(whole)


def released(case: cases.Case, steps: int = 1) -> list[Tensor]:
    """The gradients that AdamW was given in the last step, whole, in the order of the parameters."""
    found: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if type(optimizer) is torch.optim.AdamW:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            found[:] = [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in gradients]

    handle = register_optimizer_step_post_hook(keep)
    step, end, _ = sides.build(case, CPU)
    for _ in range(steps):
        step()
    end()
    handle.remove()
    return found


def gradients_of_sides(rank: int, world_size: int, pairs: list[tuple[str, str, bool]]) -> list[tuple[float, ...]]:
    """For each (model, side, tied): the norms of the difference from ours, and of ours."""
    sides.DTYPE, sides.NOISE_MULTIPLIER = torch.float32, 0.0
    sides.initialize = peers.initialize = named_weights
    answers = []
    for model, side, tied in pairs:
        (ours, theirs) = cases.parse(f"{model}:flat,{side}", microbatches=2, checkpointing=False, sharding=ALL)
        shape = replace(ours.shape, tied=tied)
        mine, other = (released(replace(case, shape=shape)) for case in (ours, theirs))
        assert len(mine) == len(other) > 0
        off = sum(float((a - b).norm() ** 2) for a, b in zip(mine, other, strict=True)) ** 0.5
        answers.append((off, sum(float(g.norm() ** 2) for g in mine) ** 0.5))
    return answers


PAIRS = [
    ("gpt2-tiny", "opacus", False),
    ("gpt2-tiny", "opacus-hooks", True),
    ("roberta-tiny", "opacus", False),
    ("roberta-tiny", "opacus-hooks", False),
    ("llama-tiny", "opacus", False),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus' own, of torch's hooks
def test_opacus_gradient_is_ours() -> None:
    for answers in run(gradients_of_sides, 2, PAIRS):
        for pair, (off, norm) in zip(PAIRS, answers, strict=True):
            assert norm > 0.1 and off / norm < 1e-3, (pair, off, norm)


def loaded_rows(rank: int, world_size: int) -> list[dict[str, Any]]:
    """Of plain training and of ours, through loaders of their own."""
    text = "llama-tiny:plain-fsdp2,flat"
    sides_of_it = cases.parse(text, microbatches=2, checkpointing=False, sharding=ALL, loader=True)
    with quiet_torch():
        warnings.filterwarnings("ignore", "DTensor random operators may not have complete support on cpu")
        return [measure.measure(side, CPU, warmup=1, steps=6, profile=False) for side in sides_of_it]


def test_through_a_loader_rows_are_counted_without_padding() -> None:
    plain, private = run(loaded_rows, 2, timeout=200.0)[0]
    assert plain["padding"] == 0 and 0 < private["padding"] < 0.8
    for row in (plain, private):
        assert row["rows_per_s"] > 0, row
    with pytest.raises(ValueError, match="not measured with --loader"):
        cases.parse("llama-tiny:opacus", microbatches=1, checkpointing=False, sharding=ALL, loader=True)


def compiled_beside_eager(rank: int, world_size: int) -> list[Any]:
    """What is released as written and compiled, and the row of a compiled case."""
    sides.DTYPE, sides.NOISE_MULTIPLIER = torch.float32, 0.0
    sides.initialize, sides.COMPILER = named_weights, "aot_eager"
    warnings.simplefilter("ignore")
    cases_ = [
        cases.parse("llama-tiny:flat", microbatches=2, checkpointing=False, sharding=ALL, compiled=compiled)[0]
        for compiled in (False, True)
    ]
    as_written, compiled = (released(case, steps=2) for case in cases_)
    off = max(float((a - b).norm() / a.norm()) for a, b in zip(as_written, compiled, strict=True))
    return [off, measure.measure(cases_[1], CPU, warmup=1, steps=1, profile=False)["graphs"]]


@pytest.mark.slow
def test_compiled_blocks_do_the_same() -> None:
    """The second step is compiled: all blocks share one graph, which nothing breaks."""
    for off, graphs in run(compiled_beside_eager, 2):
        assert off < 1e-4
        assert graphs == {"graphs": 1, "breaks": 0}


def rows_of_failures(rank: int, world_size: int, output: str) -> None:
    """`flat` cannot be built on any rank, `layer` fails in its first step on rank 1, beside sides that run."""

    def build(case: cases.Case, device: torch.device, feed: Any) -> Any:
        if case.side == "flat":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return (fail if case.side == "layer" and rank == 1 else lambda: None), lambda: None, lambda: "none"

    def fail() -> None:
        raise ValueError("rows of zero")

    sides.build = build
    measure.timed = lambda step, device: (step(), 1.0)[1]
    benchmark._start = lambda: CPU
    sys.argv = ["benchmark", "llama-tiny:flat,plain-fsdp2,layer,block", "--microbatches", "1", "--output", output]
    os.environ["WORLD_SIZE"] = str(world_size)
    benchmark.main()


def test_a_case_that_fails_is_a_row(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    run(rows_of_failures, 2, str(output))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["side"], row.get("failed")) for row in rows] == [
        ("flat", "OutOfMemoryError: CUDA out of memory"),
        ("plain-fsdp2", None),
        ("layer", "ValueError: rows of zero"),
        ("block", None),
    ]


def failure_of_one(rank: int, world_size: int, output: str) -> str:
    """Rank 1 fails, rank 0 stays in the case for longer than ranks wait for each other."""

    def measured(case: cases.Case, device: torch.device, **_: Any) -> dict[str, Any]:
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        time.sleep(4)
        raise KeyboardInterrupt  # as torchrun ends it

    measure.measure = measured
    ranks = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    (case,) = cases.parse("llama-tiny:flat", microbatches=1, checkpointing=False, sharding=ALL)
    options = argparse.Namespace(profile=False, microbatches=[1], warmup=0, steps=1, output=Path(output))
    try:
        benchmark._run(case, CPU, options, {"commit": "abc"}, ranks)
    except (SystemExit, KeyboardInterrupt) as end:
        return str(end)
    return "went on"


def test_a_rank_that_fails_alone_ends_the_run_and_leaves_a_row(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    _, second = run(failure_of_one, 2, str(output))
    assert "run the same command again for the cases after it" in second
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["failed"] == "on rank 1 alone: OutOfMemoryError: CUDA out of memory" and row["commit"] == "abc"
