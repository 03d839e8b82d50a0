"""A small GPT in float32, bfloat16 and float16 under FSDP2, private, its loss scaled or not (DP-ZeRO, arXiv 2311.11822).

    torchrun --standalone --nproc-per-node=2 -m scripts.reproduce.half_precision

Bytes of Python's standard library, 32 positions a row. `GradScaler` begins with a scale of 2^16 and doubles it while nothing
overflows; it is itself refused (docs/mixed_precision.md), so that the scales here are constants. `lost_rows` are those that
overflowed, beside all that are drawn in expectation: they contribute nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.data.packing import pack, split_row
from fsdp_dp.data.python_source import python_source
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.gpt import GPT
from fsdp_dp.models.objective import row_losses
from scripts.reproduce.rows import Experiment, Row, train

TRAIN, TEST, POSITIONS, BATCH = 20_000, 1_000, 32, 128


@functools.cache
def rows() -> tuple[Tensor, Tensor]:
    """(train, test), uint8 [N, POSITIONS + 1], from files in a shuffled order."""
    documents = python_source()
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    train, test = pack([documents[i] for i in order], POSITIONS + 1)[: TRAIN + TEST].split([TRAIN, TEST])
    return train, test


def sharded(dtype: torch.dtype) -> nn.Module:
    model = GPT(GPTConfig(layers=2, heads=2, width=32, mlp_width=64, block_size=POSITIONS))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


@torch.no_grad()
def bits_per_byte(model: nn.Module, test: Tensor) -> float:
    inputs, targets = split_row(test)
    return round(float(row_losses(model(inputs).float(), targets).mean()) / math.log(2), 3)


def run(seed: int, steps: int, dtype: torch.dtype, scale: float) -> Row:
    train_rows, test_rows = rows()
    privacy = PrivacyConfig(
        target_epsilon=3.0,
        target_delta=1e-6,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
        dataset_size=TRAIN,
        steps=steps,
        loss_reduction="sum",
    )
    model = sharded(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine = make_private(model, privacy, optimizer)
    loader = engine.loader(list(zip(*split_row(train_rows), strict=True)), BATCH * 5 // 4 // dist.get_world_size())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return scale * row_losses(model(batch[0]).float(), batch[1]).sum()

    train(model, engine, optimizer, loader, loss)
    lost = engine.nonfinite_rows.clone()
    dist.all_reduce(lost)
    return {
        "test_bits_per_byte": bits_per_byte(model, test_rows),
        "lost_rows": f"{100 * int(lost) / (steps * BATCH):.1f} %",
        "epsilon": round(engine.epsilon(), 4),
        "noise_multiplier": round(engine.noise_multiplier, 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    sides = {
        "float32": functools.partial(run, dtype=torch.float32, scale=1.0),
        "bfloat16": functools.partial(run, dtype=torch.bfloat16, scale=1.0),
        "float16": functools.partial(run, dtype=torch.float16, scale=1.0),
        "float16, loss x 2^16": functools.partial(run, dtype=torch.float16, scale=2.0**16),
        "float16, loss x 2^22": functools.partial(run, dtype=torch.float16, scale=2.0**22),
    }
    Experiment("half_precision", __doc__, seeds=3, steps=150).main(sides, arguments)


if __name__ == "__main__":
    main()
