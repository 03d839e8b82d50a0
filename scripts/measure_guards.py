"""What the guards cost: steps that are looked at against steps that are not, and the look at a draw (docs/trust.md).

torchrun --standalone --nproc-per-node=2 scripts/measure_guards.py --model llama-350m
torchrun --standalone --nproc-per-node=1 scripts/measure_guards.py --model llama-tiny      on a CPU
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.benchmark import cases, meshes, sides
from fsdp_dp.benchmark.measure import timed
from fsdp_dp.benchmark.models import batch
from fsdp_dp.draw_guard import DrawGuard
from fsdp_dp.guards import EVERY
from fsdp_dp.sampling import poisson_draw

DATASET_SIZE, DRAWS = 10**6, 50


def steps(model_name: str, device: torch.device, repetitions: int) -> tuple[float, float]:
    """Median milliseconds of a step that is not looked at, and of one that is; taken in turn."""
    sharding = meshes.parse(meshes.FULL_SHARD, dist.get_world_size())
    (case,) = cases.parse(f"{model_name}:flat", microbatches=4, checkpointing=False, sharding=sharding)
    model = sides._sharded(case, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine = make_private(model, sides._privacy(case), optimizer)
    data = [batch(case.shape, case.shape.rows, 100 * dist.get_rank() + i, device) for i in range(case.microbatches)]

    def step() -> None:
        for inputs, targets in data:
            model(inputs, targets).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def of_kind(releases: int) -> float:
        engine.guard._releases = releases
        return timed(step, device)

    for releases in (0, 1, 0, 1):
        of_kind(releases)
    pairs = [(of_kind(1), of_kind(0)) for _ in range(repetitions)]
    plain, looked_at = zip(*pairs, strict=True)
    return statistics.median(plain), statistics.median(looked_at)


def draws(rows: int) -> tuple[float, float]:
    """Milliseconds of a draw of so many rows, and of the look at it."""
    privacy = PrivacyConfig(
        max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=rows, dataset_size=DATASET_SIZE, target_delta=1e-8
    )
    guard, times = DrawGuard(privacy), []
    for number in range(DRAWS):
        start = time.perf_counter()
        drawn = poisson_draw(bytes(32), number, DATASET_SIZE, privacy.sample_rate)
        middle = time.perf_counter()
        guard.look(number, drawn)
        times.append((1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)))
    drawing, looking = zip(*times, strict=True)
    return statistics.median(drawing), statistics.median(looking)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-350m", help="of fsdp_dp.benchmark")
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    plain, looked_at = steps(options.model, device, options.repetitions)
    if dist.get_rank() == 0:
        print(f"{options.model}, {dist.get_world_size()} x {torch.cuda.get_device_name() if cuda else 'CPU'}")
        print(f"  step                      {plain:10.2f} ms")
        print(f"  step that is looked at    {looked_at:10.2f} ms")
        print(f"  cost, one of {EVERY}         {100 * (looked_at - plain) / EVERY / plain:10.4f} % of a step")
        for rows in (64, 512, 4096):
            drawing, looking = draws(rows)
            print(f"  draw of {rows:<5} rows        {drawing:10.3f} ms, look at it {looking:.3f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
