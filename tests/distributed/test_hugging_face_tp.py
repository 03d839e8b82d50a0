"""A Hugging Face Llama split by its own tensor-parallel plan, and its vocabulary with it: updates are the oracle's."""

import fnmatch
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from fsdp_dp import make_private
from tests.distributed.backends import fsdp2, mesh_of, privacy_config, quiet_torch, whole_parameters
from tests.distributed.harness import run
from tests.oracle import Rows, clipped_sum, norm, relative_error, row_gradients, share, token_losses

pytest.importorskip("transformers")
STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
ROWS, VOCABULARY, BATCH = 6, 26, 8


def llama() -> nn.Module:
    """Two layers, grouped queries, float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def rows() -> Rows:
    ids = torch.randint(0, VOCABULARY, (2, ROWS, 5), generator=torch.Generator().manual_seed(1))
    return ids[0], ids[1]


def losses(output: Any, targets_BT: torch.Tensor) -> torch.Tensor:
    return token_losses(output.logits, targets_BT)


def split(model: Any, mesh: DeviceMesh) -> nn.Module:
    """The plan that the model's configuration ships with, in torch's styles."""
    shipped = model.config.base_model_tp_plan
    names = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    plan: dict[str, ParallelStyle] = {
        f"model.{name}": STYLES[style]()
        for name in names
        for pattern, style in shipped.items()
        if style in STYLES and fnmatch.fnmatch(name, pattern)
    }
    assert len(plan) == len(names) == 14
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


@functools.cache
def bound() -> float:
    norms = [norm(g) for g in row_gradients(llama(), rows(), losses)]
    return sorted(norms)[ROWS // 2]


def error(rank: int, world_size: int) -> float:
    (inputs, targets), mesh = rows(), mesh_of(world_size // 2, 2, names=("data", "tensor"))
    expected = clipped_sum(row_gradients(llama(), (inputs, targets), losses), bound())
    with quiet_torch(), warnings.catch_warnings():
        model = fsdp2(split(llama(), mesh["tensor"]), mesh=mesh["data"])
        engine = make_private(model, privacy_config(max_grad_norm=bound()))
        start = whole_parameters(model)
        for numbers, mask in share(range(ROWS), rank=engine.model.data_rank, size=world_size // 2, microbatch=2):
            with engine.microbatch(mask):
                losses(model(input_ids=inputs[numbers]), targets[numbers]).mean().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    moved = {name: (start[name] - p) * BATCH for name, p in whole_parameters(model).items()}
    return relative_error(moved, expected)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_updates_are_the_oracles(world_size: int) -> None:
    assert max(run(error, world_size)) < 1e-10
