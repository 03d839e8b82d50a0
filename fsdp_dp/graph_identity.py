"""Tapped layers have a class of their own, so that `torch.compile` does not take a graph made without taps for theirs.

It guards a graph by the classes of the modules in it, not by their hooks: a block whose layer is frozen, or one that ran
before taps were there, would lend its graph to a block of the same code, whose layer would then not be recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_TAPPED: weakref.WeakKeyDictionary[type[nn.Module], weakref.ref[type[nn.Module]]] = weakref.WeakKeyDictionary()


class TappedClasses:
    """Gives layers a subclass of their class, one for all layers of it, until `remove`."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._classes: dict[nn.Module, type[nn.Module]] = {}
        for layer in layers:
            kind = self._classes[layer] = type(layer)
            layer.__class__ = _tapped(kind)

    def remove(self) -> None:
        for layer, kind in self._classes.items():
            layer.__class__ = kind


def _tapped(kind: type[nn.Module]) -> type[nn.Module]:
    known = _TAPPED.get(kind)
    found = known() if known is not None else None
    if found is None:
        found = derived(kind, {})
        _TAPPED[kind] = weakref.ref(found)
    return found


def derived(kind: type[nn.Module], attributes: Mapping[str, Any]) -> type[nn.Module]:
    """A class on top of a layer's that has these attributes, and is no other kind of layer."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    found = type(kind.__name__, (kind,), names | dict(attributes))
    _UNTAPPED[found] = untapped(kind)
    return found


_UNTAPPED: weakref.WeakKeyDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakKeyDictionary()


def untapped(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer had."""
    return _UNTAPPED.get(kind, kind)
