"""A layer's parameter that the program reads itself, outside the layer's forward: Mamba's ``dt_proj.weight``, a tied head.

Such a read gives a `SharedValue` of the parameter, as a read of a bare parameter does, so that this part of each row's
gradient is found as well and is added to that of the layer's own calls. In its own forward, and where it is run again row by
row, the layer finds the parameter itself.

Who is read so is found out in forwards that are watched: in these all layers have a class with a property for each parameter.
Those that were read keep it, the others are as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from fsdp_dp.graph_identity import derived
from fsdp_dp.layers import has_rule
from fsdp_dp.leaf_calls import runs_again
from fsdp_dp.shared_values import Meetings, SharedValue
from fsdp_dp.taps import Taps, shared_attribute

Site = tuple[nn.Module, str]


class OutsideReads:
    """Of the parameters of tapped layers.

    Args:
        sites: (layer, attribute) -> canonical name.
        taps: of the layers.
        active: whether the program that reads a parameter now is the model's training forward.
        share: a parameter, carried once a row behind a tap of its own.
        without_gradient: whether it is read where no gradient is recorded.
    """

    def __init__(
        self,
        sites: Mapping[Site, str],
        taps: Taps,
        meetings: Meetings,
        active: Callable[[], bool],
        share: Callable[[str, Tensor], SharedValue],
        without_gradient: Callable[[], bool],
    ) -> None:
        self._taps, self._meetings, self._active, self._share = taps, meetings, active, share
        self._without_gradient = without_gradient
        self._running: Sequence[nn.Module] = taps.running
        self._names: dict[nn.Module, dict[str, str]] = {}
        for (layer, attribute), name in sites.items():
            if taps.can_follow(layer):
                self._names.setdefault(layer, {})[attribute] = name
        self._read: set[nn.Module] = set()
        self._kinds: dict[nn.Module, tuple[type[nn.Module], type[nn.Module]]] = {}
        self._watched: list[nn.Module] = []

    def watch(self) -> None:
        """Until `keep`, all layers may be read."""
        for layer in self._names:
            if layer not in self._read and layer not in self._watched:
                kind, watched = self._kinds.setdefault(layer, (type(layer), self._with_properties(layer)))
                if type(layer) is kind:
                    layer.__class__ = watched
                    self._watched.append(layer)

    def keep(self) -> None:
        """Those that were read so far stay as they are, the others need not be asked any more."""
        for layer in self._watched:
            if layer not in self._read:
                layer.__class__ = self._kinds[layer][0]
        self._watched.clear()

    def remove(self) -> None:
        self._watched += self._read
        self._read.clear()
        self.keep()

    def _with_properties(self, layer: nn.Module) -> type[nn.Module]:
        def share(name: str, parameter: Tensor) -> SharedValue:
            """Nothing is recorded, nor kept, of who only asks for its shape or its type."""

            def first_used() -> Tensor:
                if layer not in self._read:
                    self._read.add(layer)
                    self._taps.always_follow(layer)
                return self._share(name, parameter).per_row

            return SharedValue.later(parameter, first_used, name, self._meetings)

        def is_outside() -> bool:
            running = self._running[-1] if self._running else None
            by_leaf = running is not None and running in self._names and not has_rule(running)
            return running is not layer and not by_leaf and not runs_again()

        def active() -> bool:
            return is_outside() and self._active()

        def without_gradient() -> bool:
            return is_outside() and self._without_gradient()

        attributes = {
            a: shared_attribute(name, a, active, share, without_gradient, share)
            for a, name in self._names[layer].items()
        }
        return derived(type(layer), attributes)
