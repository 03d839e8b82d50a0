"""What the program is given where it reads a parameter itself: a `SharedValue`, one of each parameter in a forward.

Their modules get a subclass of their class with a property for each: that also answers when only a part of a module's forward
is run again, by activation checkpointing. FSDP, which moves parameters around, reads and writes what is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_dp.compiled import as_written
from fsdp_dp.shared_values import Meetings, SharedValue
from fsdp_dp.taps import ABSENT, Bare, raw_attribute


class ParameterReads:
    """Of one forward, and of each backward that runs parts of it again.

    Args:
        active: whether the program that reads a parameter now is the model's training forward.
        without_gradient: whether it reads it where no gradient is recorded. It is a constant as long as it is used so; but
            the program may keep it and use it where its gradient is wanted.
        per_row: a parameter, carried once a row behind a tap: ``[*shape]`` to ``[B, *shape]``.
    """

    def __init__(
        self,
        active: Callable[[], bool],
        without_gradient: Callable[[], bool],
        per_row: Callable[[str, Tensor], Tensor],
        meetings: Meetings,
    ) -> None:
        self._active, self._without_gradient, self.per_row, self._meetings = active, without_gradient, per_row, meetings
        self._made: dict[tuple[Any, ...], tuple[Tensor, SharedValue]] = {}

    def forget(self) -> None:
        self._made.clear()

    def of(self, reader: object, name: str, parameter: Tensor, first_used: Callable[[], Tensor]) -> SharedValue | None:
        """``parameter`` as ``reader`` gives it to the program, the same object each time; None where it is what it is."""
        if not (self._active() or self._without_gradient()):
            return None
        place = reader, name, torch._C._current_graph_task_id()
        source, made = self._made.get(place, (None, None))
        if made is None or source is not parameter:  # FSDP gathers it into another tensor, or shards it
            made = SharedValue.later(parameter, first_used, name, self._meetings)
            self._made[place] = parameter, made
        return made


class SharedParameters:
    """Bare parameters look like shared values to the program, wherever it reads them."""

    def __init__(self, bare: Sequence[Bare], reads: ParameterReads) -> None:
        self._classes: dict[nn.Module, type[nn.Module]] = {}
        owners: dict[nn.Module, dict[str, Any]] = {}

        def share(module: nn.Module, name: str, parameter: Tensor) -> SharedValue | None:
            return reads.of(self, name, parameter, lambda: reads.per_row(name, parameter))

        for p in bare:
            owners.setdefault(p.owner, {})[p.attribute] = shared_attribute(p.name, p.attribute, share)
        for owner, attributes in owners.items():
            kind = self._classes[owner] = type(owner)
            owner.__class__ = type(kind.__name__, (kind,), {**attributes, "__module__": kind.__module__})

    def remove(self) -> None:
        for owner, kind in self._classes.items():
            owner.__class__ = kind


def shared_attribute(
    name: str, attribute: str, share: Callable[[nn.Module, str, Tensor], SharedValue | None]
) -> property:
    """A parameter's place on a module, which gives what ``share`` makes of it, if it does."""

    def read(module: nn.Module) -> Any:
        value = raw_attribute(module, attribute)
        if value is ABSENT:
            raise AttributeError(attribute)
        by_fsdp = "/torch/distributed/" in _reader()
        if by_fsdp or not isinstance(value, Tensor) or isinstance(value, SharedValue):
            return value
        shared = share(module, name, value)
        return value if shared is None else shared

    return place_of(attribute, as_written(read))


def place_of(attribute: str, read: Callable[[nn.Module], Any]) -> property:
    """A parameter's place on a module that is read in another way. FSDP1 puts views there, and takes them away."""

    def write(module: nn.Module, value: Any) -> None:
        module.__dict__[attribute] = value  # parameters go to nn.Module's own registry and do not come here

    def delete(module: nn.Module) -> None:
        del module.__dict__[attribute]

    return property(read, write, delete)


def _reader() -> str:
    """The file that reads an attribute, beyond what `as_written` puts in between."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "/torch/_dynamo/" in frame.f_code.co_filename.replace("\\", "/"):
        frame = frame.f_back
    return frame.f_code.co_filename.replace("\\", "/")
