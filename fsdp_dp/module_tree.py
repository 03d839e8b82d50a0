"""The modules of a model, walked before every forward: without the names that `nn.Module.named_modules` puts together."""

from __future__ import annotations

from torch import nn


def modules_of(root: nn.Module) -> list[nn.Module]:
    """Every module once, as ``root.modules()`` has them but in no particular order, always the same for the same tree."""
    found = {root: None}
    waiting = [root]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)
