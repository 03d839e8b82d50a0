"""The tree of modules is the model's own, also after a module was put in, taken out or replaced."""

import torch
from torch import nn

from fsdp_dp.module_tree import ModuleTree


def test_what_changes_is_seen() -> None:
    """Seen to fail when the first walk's modules are returned ever after."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    tree = ModuleTree(model)

    def agrees() -> bool:
        return set(tree.modules()) == set(model.modules()) and len(tree.modules()) == len(set(model.modules()))

    assert agrees() and tree.modules() == tree.modules()
    model[1].append(nn.Dropout())
    assert agrees()
    model[1][0] = nn.Bilinear(2, 2, 2)
    assert agrees()
    model[1].extra = model[0]  # the same module in a second place
    assert agrees()
    del model[1].extra
    model[1].later = None
    assert agrees()
    model[1].later = nn.Identity()
    assert agrees() and torch.is_tensor(model[0].weight)
    model._modules = {"0": model[0]}
    assert agrees()
