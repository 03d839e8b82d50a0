"""A layer's parameter that the program reads itself, outside the layer's forward: Mamba's ``dt_proj.weight``, a tied head.

Such a read gives a `SharedValue` of the parameter, as a read of a bare parameter does, so that this part of each row's
gradient is found as well and is added to that of the layer's own calls. In its own forward, and where it is run again row by
row, the layer finds the parameter itself.

Who is read so is found out in forwards that are watched: in these all layers have a class with a property for each parameter.
Those that were read keep it; what others may still be read in, later, is seen by `late_reads`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fsdp_dp.graph_identity import derived
from fsdp_dp.late_reads import guarded
from fsdp_dp.layers import has_rule
from fsdp_dp.leaf_calls import runs_again
from fsdp_dp.parameter_reads import ParameterReads, shared_attribute
from fsdp_dp.shared_values import SharedValue
from fsdp_dp.taps import Taps

Site = tuple[nn.Module, str]


class OutsideReads:
    """Of the parameters of tapped layers.

    Args:
        sites: (layer, attribute) -> canonical name.
        taps: of the layers.
        reads: what the program is given in place of a parameter.
    """

    def __init__(
        self,
        sites: Mapping[Site, str],
        taps: Taps,
        reads: ParameterReads,
    ) -> None:
        self._taps, self._reads = taps, reads
        self._running: Sequence[nn.Module] = taps.running
        self._names: dict[nn.Module, dict[str, str]] = {}
        self._layers: dict[str, list[nn.Module]] = {}
        for (layer, attribute), name in sites.items():
            if taps.can_follow(layer):
                self._names.setdefault(layer, {})[attribute] = name
                self._layers.setdefault(name, []).append(layer)
        self._read: set[nn.Module] = set()
        self._kinds: dict[nn.Module, tuple[type[nn.Module], type[nn.Module]]] = {}
        self._watched: list[nn.Module] = []
        self._guards: dict[nn.Module, type[nn.Module]] = {}
        self._guard_of: dict[tuple[Any, ...], type[nn.Module]] = {}
        self._read_late: list[nn.Module] = []

    def watch(self) -> None:
        """Until `keep`, all layers may be read."""
        for layer in self._names:
            if layer not in self._read and layer not in self._watched:
                kind, watched = self._kinds.setdefault(layer, (type(layer), self._with_properties(layer)))
                if type(layer) in (kind, self._guards.get(layer)):
                    layer.__class__ = watched
                    self._watched.append(layer)

    def keep(self) -> None:
        """Those that were read so far are asked from now on, the others look at who reads them (see `late_reads`)."""
        for layer in self._watched:
            if layer not in self._read:
                layer.__class__ = self._guard(layer)
        self._watched.clear()
        for layer in self._read_late:
            layer.__class__ = self._kinds[layer][1]
        self._read_late.clear()

    def remove(self) -> None:
        for layer, (kind, _) in self._kinds.items():
            layer.__class__ = kind
        self._kinds.clear()
        self._watched.clear()
        self._read.clear()

    def _with_properties(self, layer: nn.Module) -> type[nn.Module]:
        def share(module: nn.Module, name: str, parameter: Tensor) -> SharedValue | None:
            """Nothing is recorded, nor kept, of who only asks for its shape or its type."""
            if module is not layer or not self._is_outside(layer):  # a shallow copy has the layer's class, and its taps
                return None
            return self._reads.of(self, name, parameter, lambda: self._first_used(name, parameter))

        attributes = {a: shared_attribute(name, a, share) for a, name in self._names[layer].items()}
        return derived(type(layer), attributes)

    def _guard(self, layer: nn.Module) -> type[nn.Module]:
        """One class for all layers that are alike, as without it: what Python caches of a class is cached once."""
        if layer not in self._guards:
            like = self._kinds[layer][0], tuple(self._names[layer])
            if like not in self._guard_of:
                self._guard_of[like] = guarded(*like, self._read_first)
            self._guards[layer] = self._guard_of[like]
        return self._guards[layer]

    def _read_first(self, layer: nn.Module, attribute: str, parameter: Tensor) -> SharedValue | None:
        """In a forward that is not watched, by the program: the layer's own reads go on as they did until its end."""
        name = self._names.get(layer, {}).get(attribute)
        if name is None or runs_again():
            return None
        return self._reads.of(self, name, parameter, lambda: self._first_used(name, parameter))

    def _is_outside(self, layer: nn.Module) -> bool:
        running = self._running[-1] if self._running else None
        by_leaf = running is not None and running in self._names and not has_rule(running)
        return running is not layer and not by_leaf and not runs_again()

    def _first_used(self, name: str, parameter: Tensor) -> Tensor:
        for layer in self._layers[name]:  # one object is all of theirs, where they are tied
            if layer not in self._read:
                self._read.add(layer)
                if layer not in self._watched:
                    self._read_late.append(layer)
                self._taps.always_follow(layer)
        return self._reads.per_row(name, parameter)
