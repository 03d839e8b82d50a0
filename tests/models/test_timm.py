"""`timm`'s vision transformer, and its ResNet with group norm; skipped where timm or torchvision does not import."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import replace_batch_norm
from tests.agreement import Batch, Subject, assert_exact

try:
    import timm
except Exception as error:  # torchvision's kernels may be of another torch, which is no ImportError
    pytest.skip(f"timm does not import: {error}", allow_module_level=True)

ROWS = 5
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 2, "init_values": 0.1}
RESNET = {"layers": [1, 1, 1, 1]}


def build(name: str, options: dict[str, Any], replaced: bool) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options)
    if replaced:
        replace_batch_norm(model)
    return model.double().train()


def batch() -> Batch:
    x = torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"x": x, "labels": torch.arange(ROWS) % 3}


def losses(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"], reduction="none")


@pytest.mark.parametrize(
    ("name", "options", "replaced"),
    [("vit_tiny_patch16_224", VIT, False), ("resnet18", RESNET, True)],
    ids=["ViT", "ResNet"],
)
def test_update_is_the_oracles(name: str, options: dict[str, Any], replaced: bool) -> None:
    assert_exact(Subject(model=functools.partial(build, name, options, replaced), batch=batch, losses=losses))
