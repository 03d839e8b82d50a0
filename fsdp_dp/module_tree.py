"""The modules of a model, asked for before every forward: without the names that `nn.Module.named_modules` puts together."""

from __future__ import annotations

from torch import nn


class ModuleTree:
    """The modules below a root, walked again only where some module has other children than it had."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._children: list[tuple[nn.Module, tuple[nn.Module | None, ...]]] = []
        self._modules: list[nn.Module] = []

    def modules(self) -> list[nn.Module]:
        """Every module once, as ``root.modules()`` has them but in no particular order, always the same for the same tree."""
        for module, before in self._children:
            if tuple(module._modules.values()) != before:
                break
        else:
            if self._modules:
                return self._modules
        found = {self._root: None}
        waiting = [self._root]
        while waiting:
            for child in waiting.pop()._modules.values():
                if child is not None and child not in found:
                    found[child] = None
                    waiting.append(child)
        self._modules = list(found)
        self._children = [(module, tuple(module._modules.values())) for module in found]
        return self._modules
