"""A layer's parameter that the program reads itself in a forward which nobody watches (see `outside_reads`).

Each layer's class has a property for each of its parameters, which looks at who reads: a call of the layer is on the stack
where its own forward reads, and mostly it is the reader's caller; then the layer's tap records that. What is left is a read
by the program. It costs the host less than `nn.Module.__getattr__`, by which a parameter is read otherwise.
"""

from __future__ import annotations

import dis
import functools
import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_dp.graph_identity import derived
from fsdp_dp.parameter_reads import place_of
from fsdp_dp.taps import ABSENT, raw_attribute

Share = Callable[[nn.Module, str, Tensor], Any]
"""Of a module, an attribute and its value: what the program is given, None if that is the value."""

_CALLS = nn.Module._call_impl.__code__.co_filename
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_MOVES = (os.path.join(_TORCH, "distributed", ""), os.path.join(os.path.dirname(__file__), ""))
"""FSDP moves parameters around, and the engine looks at them."""
_ASKED = frozenset(
    "shape dtype device layout ndim is_cuda is_cpu is_meta itemsize nbytes size dim numel nelement stride element_size "
    "is_floating_point is_complex is_contiguous get_device".split()
)
"""What a parameter may be asked without using it, and says as without the engine."""


def guarded(kind: type[nn.Module], attributes: tuple[str, ...], share: Share) -> type[nn.Module]:
    """A class on top of a layer's for which ``share`` is asked where the program reads one of these parameters."""
    own = _of_torch(kind)
    return derived(kind, {attribute: _guard(attribute, own, share) for attribute in attributes})


def _of_torch(kind: type[nn.Module]) -> frozenset[CodeType]:
    """The code of torch's own layers: these read no one's parameters but their own."""
    functions = (x for one in kind.__mro__ if one is not nn.Module for x in vars(one).values())
    return frozenset(
        x.__code__ for x in functions if hasattr(x, "__code__") and x.__code__.co_filename.startswith(_TORCH)
    )


def _guard(attribute: str, own: frozenset[CodeType], share: Share) -> property:
    def read(module: nn.Module) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return raw_attribute(module, attribute)
        table = module.__dict__
        value = table[attribute] if attribute in table else module._parameters.get(attribute, ABSENT)
        reader = sys._getframe(1)
        caller = reader.f_back
        if reader.f_code in own and caller is not None and caller.f_code.co_filename is _CALLS:
            return value
        if value is ABSENT:
            raise AttributeError(attribute)
        if not isinstance(value, Tensor) or _is_asked(reader.f_code, reader.f_lasti) or _is_called(module, reader):
            return value
        shared = share(module, attribute, value)
        return value if shared is None else shared

    return place_of(attribute, read)


@functools.lru_cache(maxsize=4096)
def _is_asked(code: CodeType, offset: int) -> bool:
    """Whether the attribute that is read there is only asked for its shape, or its type: models do so all the time.

    Nor is it used where FSDP reads it.
    """
    if code.co_filename.startswith(_MOVES):
        return True
    following = False
    for instruction in dis.get_instructions(code):
        if following and instruction.opname not in ("EXTENDED_ARG", "CACHE"):
            return instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and instruction.argval in _ASKED
        following = following or instruction.offset == offset
    return False


def _is_called(module: nn.Module, reader: FrameType | None) -> bool:
    """Whether a call of the layer is on the stack, so that its tap records it: its own forward reads, or one of its hooks."""
    frame = reader
    while frame is not None:
        if frame.f_code.co_filename is _CALLS and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False
