"""A `TorchFunctionMode` that outlives the context in which it was started: put in below the others, taken out again."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext


def put_in(mode: TorchFunctionMode) -> None:
    """Below all other modes, so that contexts around it end as they began; above torch's default device."""
    others = [_pop_mode() for _ in range(_len_torch_function_stack())]
    if others and isinstance(others[-1], DeviceContext):
        _push_mode(others.pop())
    _push_mode(mode)
    for other in reversed(others):
        _push_mode(other)


def take_out(mode: TorchFunctionMode) -> None:
    """Wherever in the stack it is by now, if it is in it."""
    above = []
    while _len_torch_function_stack():
        top = _pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
