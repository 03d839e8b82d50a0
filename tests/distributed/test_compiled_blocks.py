"""Compiled blocks, sharded on two ranks: one graph each, and the oracle's sums."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from fsdp_dp import make_private
from tests.distributed.backends import EXPECTED_BATCH_SIZE, TOLERANCE, privacy_config
from tests.distributed.harness import run
from tests.oracle import clipped_sum, norm, relative_error, row_gradients, square_losses
from tests.unit.test_compile import rows
from tests.unit.test_compiled_blocks import Model, Sizes

CPU = torch.device("cpu")


def partly_frozen() -> Model:
    model = Model(blocks=3)
    model.blocks[0].up.requires_grad_(False)
    return model


def sharded(model: Model, backend: str) -> nn.Module:
    if backend == "FSDP2":
        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = FullyShardedDataParallel(block, use_orig_params=True, device_id=CPU)
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=CPU)


def compiled_as(model: Model, how: str, compiler: Any) -> None:
    for i, block in enumerate(model.blocks):
        if how == "torch.compile(block)":
            model.blocks[i] = torch.compile(block, backend=compiler)
        else:
            block.compile(backend=compiler)


def trained(rank: int, world_size: int, backend: str, how: str, compiler: str) -> tuple[list[float], list[int], int]:
    """Errors of norms and released sums, recorded layers of every graph, and breaks."""
    warnings.simplefilter("ignore")
    torch._dynamo.reset()
    counters.clear()
    x, y = (torch.cat([t, 0.5 + t.flip(0)]) for t in rows())
    gradients = list(row_gradients(partly_frozen(), (x, y), square_losses))
    norms = torch.tensor([norm(g) for g in gradients], dtype=torch.float64)
    bound = float(norms.median())
    expected = clipped_sum(gradients, bound)
    sizes, model = Sizes(compiler), partly_frozen()
    compiled_as(model, how, sizes)
    private = sharded(model, backend)
    engine = make_private(private, privacy_config(max_grad_norm=bound))
    mine = torch.arange(len(x)).chunk(world_size)[rank]
    errors = []
    for _ in range(3):
        for some in mine.split(2):
            square_losses(private(x[some]), y[some]).mean().backward()
            errors.append(float((engine.per_sample_norms - norms[some]).abs().max()))
        engine.privatize()
        if backend == "FSDP2":
            found = {n.replace("_orig_mod.", ""): p.grad for n, p in private.named_parameters() if p.grad is not None}
            whole = {name: grad.full_tensor() * EXPECTED_BATCH_SIZE for name, grad in found.items()}
            errors.append(relative_error(whole, expected))
        engine.discard()
    return errors, sizes.records, sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    ("backend", "how", "compiler"),
    [
        ("FSDP2", "block.compile()", "aot_eager"),
        pytest.param("FSDP2", "torch.compile(block)", "aot_eager", marks=pytest.mark.slow),
        pytest.param("FSDP1", "block.compile()", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_are_exact(backend: str, how: str, compiler: str) -> None:
    """The second and third block share a graph; the first one's has a layer that is not recorded."""
    for errors, records, breaks in run(trained, 2, backend, how, compiler):
        assert max(errors) <= TOLERANCE
        assert records == [2, 3]
        assert breaks == 0


def of_a_fork(rank: int, world_size: int) -> list[float]:
    """Errors of norms, where the last rank calls the last block and does not use it."""
    warnings.simplefilter("ignore")
    torch._dynamo.reset()

    def forked() -> Model:
        model = Model(blocks=6)  # more than sums that may be under way
        model.around = lambda block, x: x + block(x).detach() if rank and block is model.blocks[-1] else block(x)
        return model

    (x, y), model = rows(), forked()
    norms = [norm(g) for g in row_gradients(forked(), (x, y), square_losses)]
    compiled_as(model, "block.compile()", "aot_eager")
    private, found = sharded(model, "FSDP2"), []
    engine = make_private(private, privacy_config(max_grad_norm=1e9, clipping="block"))
    for _ in range(3):
        square_losses(private(x), y).mean().backward()
        found.append(float((engine.per_sample_norms - torch.tensor(norms, dtype=torch.float64)).abs().max()))
        engine.privatize()
        engine.discard()
    return found


def test_no_rank_waits_for_a_block_that_another_does_not_use() -> None:
    """Seen to hang when the report of a block that backward does not come to waits for the end of backward."""
    for errors in run(of_a_fork, 2, timeout=120.0):
        assert max(errors) <= TOLERANCE
