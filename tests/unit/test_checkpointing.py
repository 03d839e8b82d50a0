"""Non-reentrant activation checkpointing, full and selective: exact, also with dropout, and nothing is kept twice."""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fsdp_dp import UnsupportedModelError, make_private
from tests.distributed.backends import EXPECTED_BATCH_SIZE, TOLERANCE, privacy_config
from tests.oracle import (
    WIDTH,
    Block,
    clipped_sum,
    norm,
    relative_error,
    row_gradients_of_one_forward,
    square_losses,
    trainable,
)

PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


def keep_every_second_product() -> Callable[..., CheckpointPolicy]:
    """As torchtitan does: which product it is, is a matter of counting."""
    seen = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen[context.is_recompute] += op in PRODUCTS
        save = op in PRODUCTS and seen[context.is_recompute] % 2
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def every_second_product() -> Any:
    return create_selective_checkpoint_contexts(keep_every_second_product())


WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "list of operators": {"context_fn": functools.partial(create_selective_checkpoint_contexts, PRODUCTS)},
    "policy": {"context_fn": every_second_product},
    "without early stop": {"early_stop": False},
}


class Stack(nn.Module):
    def __init__(self, way: str | None, wrapped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.blocks = nn.ModuleList(Block(dropout=0.3) for _ in range(2))
        if wrapped:
            for block in self.blocks:
                block.attention = checkpoint_wrapper(block.attention)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.way is None else checkpoint(block, x, use_reentrant=False, **WAYS[self.way])
        return x


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, WIDTH, generator=generator).double(), torch.randn(5, 1, generator=generator).double()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_masks_of_dropout_are_those_of_the_forward(way: str, wrapped: bool) -> None:
    x, y = rows()
    reference, model = Stack(None), Stack(way, wrapped)
    torch.manual_seed(11)
    gradients = list(row_gradients_of_one_forward(reference, (x, y), square_losses))
    bound = sorted(norm(g) for g in gradients)[len(gradients) // 2]
    engine = make_private(model, privacy_config(max_grad_norm=bound))
    for _ in range(2):  # the first forward is watched, the second one is not
        torch.manual_seed(11)
        square_losses(model(x), y).mean().backward()
        engine.privatize()
        released = {n: p.grad * EXPECTED_BATCH_SIZE for n, p in trainable(model).items()}
        assert relative_error(released, clipped_sum(iter(gradients), bound)) <= TOLERANCE
        engine.discard()


def test_reentrant_checkpointing_is_refused() -> None:
    model, (x, y) = Stack(None), rows()
    first = model.blocks[0]
    reentrant = copy.copy(first.forward)
    first.forward = lambda h: checkpoint(reentrant, h, use_reentrant=True)  # type: ignore[method-assign]
    make_private(model, privacy_config(max_grad_norm=1.0))
    with pytest.raises(UnsupportedModelError, match="reentrant"):
        square_losses(model(x.requires_grad_()), y).mean().backward()


@pytest.mark.parametrize("microbatch", [0, 1])
def test_reentrant_checkpointing_beside_another_use_is_refused(microbatch: int) -> None:
    """Seen to fail: the layer had been called with a graph as well, so what was recomputed passed for that call's."""
    model, (x, y) = Stack(None), rows()
    first = model.blocks[0]
    plain = copy.copy(first.forward)
    first.forward = lambda h: plain(h) + (checkpoint(plain, h, use_reentrant=True) if again else 0)  # type: ignore[method-assign]
    make_private(model, privacy_config(max_grad_norm=1.0))
    for i in range(microbatch + 1):
        again = i == microbatch
        refusal = pytest.raises(UnsupportedModelError, match="reentrant") if again else contextlib.nullcontext()
        with refusal:
            square_losses(model(x.requires_grad_()), y).mean().backward()
