"""The benchmark on every sharding: replicas stay the same to the bit, and privacy adds the norms of split rows alone."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from fsdp_dp.benchmark import cases, measure, meshes, models
from tests.distributed.backends import local, quiet_torch
from tests.distributed.harness import run

MICROBATCHES = 2
GROUPS = {"flat": 1, "block": 3, "layer": 21}  # of llama-tiny: two blocks of nine layers, embedding, norm and head
TOGETHER = {"flat": 1, "block": 3, "layer": 5}  # those of a block
CPU = torch.device("cpu")
MESHES = {2: ("tp=2", "hsdp=2x1"), 4: ("hsdp=2x2", "tp=2"), 8: ("full_shard", "hsdp=2x4", "tp=2")}


def rows(rank: int, world_size: int) -> list[list[dict[str, Any]]]:
    """Of each sharding, the sides' rows."""
    found = []
    for name in MESHES[world_size]:
        sharding = meshes.parse(name, world_size)
        text = "llama-tiny:plain-fsdp2,flat,block,layer"
        sides = cases.parse(text, microbatches=MICROBATCHES, checkpointing=False, sharding=sharding)
        with quiet_torch():
            warnings.filterwarnings("ignore", "DTensor random operators may not have complete support on cpu")
            found.append([measure.measure(side, CPU, warmup=1, steps=1, profile=False) for side in sides])
    return found


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_privacy_adds_the_norms_of_split_rows_alone(world_size: int) -> None:
    for plain, *private in run(rows, world_size, timeout=500.0)[0]:
        for row in (plain, *private):
            assert row["replicas"] == ("none" if row["sharding"] == "full_shard" else "identical"), row
        for row in private:
            calls, norms = (MICROBATCHES * n[row["side"]] * ("tp" in row["sharding"]) for n in (TOGETHER, GROUPS))
            assert row["collectives"].pop("all-reduce", 0) == plain["collectives"].get("all-reduce", 0) + calls
            sent = plain["collectives_bytes"].get("all-reduce", 0) + norms * 5 * row["rows"] * 8  # float64 [5, B]
            assert row["collectives_bytes"].pop("all-reduce", 0) == sent
            for key in ("collectives", "collectives_bytes"):
                assert row[key] == {kind: n for kind, n in plain[key].items() if kind != "all-reduce"}


def compared(rank: int, world_size: int, name: str) -> tuple[str, str]:
    """Replicas as they were made, and after one rank has moved one number of a norm layer by one bit."""
    mesh = meshes.mesh_of(meshes.parse(name, world_size), "cpu")
    torch.manual_seed(0)
    model = models.Transformer(models.MODELS["llama-tiny"], tied=False, checkpointing=False)
    if "tp" in name:
        meshes.split_linears(model.blocks, mesh["tensor"])
    fully_shard(model, mesh=meshes.data_mesh(mesh))
    before = meshes.replicas(model, mesh)
    if rank == 1:
        local(model.norm.weight).view(torch.int32)[0] += 1
    return before, meshes.replicas(model, mesh)


@pytest.mark.parametrize("name", ["hsdp=2x1", "tp=2"])
def test_a_bit_that_differs_is_seen_on_all_ranks(name: str) -> None:
    assert run(compared, 2, name) == [("identical", "differ")] * 2


ROOT = Path(__file__).resolve().parents[2]
NO_MEMORY_ON_ONE = """
import torch, torch.distributed as dist
from fsdp_dp.benchmark import __main__ as benchmark, measure

def measured(case, device, **options):
    if case.side == "flat":
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        dist.barrier()
    return benchmark._named(case) | {"ms": 1.0}

measure.measure = measured
benchmark.main()
"""


@pytest.mark.slow
def test_a_rank_without_memory_ends_all_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Seen to fail when the rank went on to the next case alone."""
    script, rows_file = tmp_path / "one.py", tmp_path / "rows.jsonl"
    script.write_text(NO_MEMORY_ON_ONE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["llama-tiny:plain-fsdp2,flat,block", "--microbatches", "1", "--output", str(rows_file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = [subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode for _ in range(2)]
    assert ended == [1, 0]
    found = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert [(row["side"], row.get("failed")) for row in found] == [
        *(("plain-fsdp2", None), ("flat", "on rank 1 alone: OutOfMemoryError: CUDA out of memory"), ("block", None)),
    ]
