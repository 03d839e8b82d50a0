"""A small ResNet with GroupNorm on digits, private under ZeRO-1 and under FSDP (DP-ZeRO, arXiv 2311.11822, first experiment).

    torchrun --standalone --nproc-per-node=2 -m scripts.reproduce.resnet_digits

The digits are the 1797 of 8 x 8 pixels that `scikit-learn` ships: 1497 to train on, 300 held out. Under ZeRO-1 parameters are
replicated (DDP) and the optimizer's state is split; under FSDP both are. `plain` is FSDP without privacy.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.models.config import ResNetConfig
from fsdp_dp.models.resnet import ResNet
from scripts.reproduce.rows import Experiment, Row, accuracy, classify, draws, train

TRAIN, BATCH, DELTA = 1497, 256, 1e-4
LEARNING_RATE = 1e-2


def resnet() -> nn.Module:
    """Of the recipe conf/experiment/resnet_digits.yaml."""
    return ResNet(ResNetConfig(channels=1, image_size=8, stages=2, width=16, groups=4))


@functools.cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train, test), each images [N, 1, 8, 8] from -1 to 1 and labels [N]."""
    from sklearn.datasets import load_digits

    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = ((images[i], labels[i]) for i in order.split([TRAIN, len(images) - TRAIN]))
    return train, test


def fsdp() -> nn.Module:
    return FullyShardedDataParallel(resnet(), device_id=torch.device("cpu"), use_orig_params=True)


def zero1() -> nn.Module:
    return DistributedDataParallel(resnet())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Adam, its state split over the ranks where FSDP does not do so."""
    if isinstance(model, FullyShardedDataParallel):
        return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its use of torch.jit
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=LEARNING_RATE)


def private(seed: int, steps: int, make: Callable[[], nn.Module]) -> Row:
    rows, held_out = digits()
    privacy = PrivacyConfig(
        target_epsilon=3.0,
        target_delta=DELTA,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
        dataset_size=TRAIN,
        steps=steps,
    )
    model = make()
    optimizer = optimizer_of(model)
    engine = make_private(model, privacy, optimizer)
    loader = engine.loader(list(zip(*rows, strict=True)), BATCH * 5 // 4 // dist.get_world_size())
    train(model, engine, optimizer, loader, classify)
    return {
        "test_accuracy": accuracy(model, *held_out),
        "epsilon": round(engine.epsilon(), 4),
        "noise_multiplier": round(engine.noise_multiplier, 4),
    }


def plain(seed: int, steps: int) -> Row:
    rows, held_out = digits()
    model = fsdp()
    train(model, None, optimizer_of(model), draws(list(zip(*rows, strict=True)), BATCH, steps, seed), classify)
    return {"test_accuracy": accuracy(model, *held_out)}


def main(arguments: Sequence[str] | None = None) -> None:
    sides = {
        "zero1": functools.partial(private, make=zero1),
        "fsdp": functools.partial(private, make=fsdp),
        "plain": plain,
    }
    Experiment("resnet_digits", __doc__, seeds=3, steps=100).main(sides, arguments)


if __name__ == "__main__":
    main()
