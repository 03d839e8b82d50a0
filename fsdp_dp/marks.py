"""What the first forward knows of its tensors: which descend from the rows, and which hold entries picked by the data.

A layer may be given ``[entries, ...]`` where each row has equally many entries, in order; the rehearsal proves it (see
`independence`). Entries that were *picked* along the rows, by an index or a mask that depends on the data or on chance (the
tokens of an expert, unpadded sequences), may line up with the rows once and not the next time, which no rehearsal can rule
out. So they are told apart here, function by function.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor

_MARKS = "_fsdp_dp_marks"
ROWS, CHANCE, PICKED = "rows", "chance", "picked"
SORTED, PACKED, PADDED = "sorted", "packed", "padded"
_PACKING = frozenset({"index_select", "__getitem__", "_pack_padded_sequence", "_pad_packed_sequence"})

PICKED_REFUSED = (
    "is given entries that were picked from all rows by the data or by chance (tokens of an expert, positions without "
    "padding), so they cannot be told apart by row. Run one row a microbatch, keep the batch as the first dimension (for "
    "Hugging Face mixtures of experts: experts_implementation='batched_mm' in the config), or put what picks them and the "
    "parameters into one module without children"
)

_DRAWING = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal".split()
)
_WRITING = frozenset(
    "index_add index_add_ index_copy index_copy_ index_put index_put_ index_reduce index_reduce_ scatter scatter_ "
    "scatter_add scatter_add_ scatter_reduce scatter_reduce_ masked_scatter masked_scatter_ __setitem__".split()
)
"""Entries go back to where the first argument has them."""
_READS = frozenset("tolist numpy __array__ item __int__ __index__ __bool__ __float__".split())
BY_PYTHON = frozenset({"tensor", "as_tensor", "__getitem__", "roll"})
"""Functions that may be told by Python which rows to pick."""
_ORDERING = frozenset("sort topk msort".split())


def draws_outside() -> Any:
    """What is different as soon as Python or NumPy has drawn random numbers."""
    numpy = sys.modules.get("numpy.random")
    state: Any = numpy and numpy.get_state()
    return random.getstate(), state and (state[1].tobytes(), *state[2:])


def marks(x: Tensor) -> frozenset[str]:
    return getattr(x, _MARKS, frozenset()) | (frozenset({ROWS}) if x.requires_grad else frozenset())


def _is_shared(x: Tensor) -> bool:
    """Whether a tensor is a `SharedValue`, without asking it for its rows."""
    return hasattr(type(x), "per_row")


def mark(x: Tensor, found: frozenset[str]) -> None:
    if not _is_shared(x):
        setattr(x, _MARKS, getattr(x, _MARKS, frozenset()) | found)


def mark_rows(x: Tensor) -> None:
    """Say that a tensor descends from the rows of the microbatch."""
    mark(x, frozenset({ROWS}))


def forget(x: Tensor) -> None:
    """What an earlier forward knew of a tensor that the program keeps."""
    if hasattr(x, _MARKS):
        delattr(x, _MARKS)


def is_marked(x: Tensor) -> bool:
    """Whether a tensor is known to descend from the rows; in the first forward this is complete."""
    return not _is_shared(x) and ROWS in marks(x)


def is_picked(x: Tensor) -> bool:
    """Whether a tensor is known to hold entries that were picked along the rows, by the data or by chance."""
    return PICKED in getattr(x, _MARKS, ())


def reads_rows(name: str, tensors: Iterable[Tensor]) -> bool:
    """Whether a function gives values of rows to Python, or to NumPy, where they are out of sight."""
    return name in _READS and any(is_marked(x) for x in tensors)


def marks_of(
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Iterable[Tensor],
    *,
    by_python: bool = False,
) -> frozenset[str]:
    """The marks of what a function returns.

    Args:
        by_python: Python was given values of rows, or it (or NumPy) drew random numbers, in this forward: what comes from
            there may vary.
    """
    plain = [x for x in tensors if not _is_shared(x)]
    found = frozenset().union(*map(marks, plain))
    if name in _PACKING and plain and (known := _of_packing(name, marks(plain[0]))) is not None:
        return known
    if name in _WRITING and args and isinstance(args[0], Tensor):
        found = (found - {PICKED}) | (marks(args[0]) & {PICKED})
    if name in _DRAWING or (name in ("tensor", "as_tensor") and (by_python or any(map(_is_of_numpy, args[:1])))):
        found |= {CHANCE}
    return found | {PICKED} if plain and _picks(name, args, kwargs, by_python) else found


def _of_packing(name: str, found: frozenset[str]) -> frozenset[str] | None:
    """The marks of what torch's own `pack_padded_sequence` and `pad_packed_sequence` make of a tensor with marks ``found``.

    Packed entries are picked by lengths. Padded again, the rows are where they were: if they were not sorted, or if their
    order is undone.
    """
    if name == "_pack_padded_sequence":
        return found | {PICKED} | ({PACKED} if PICKED not in found else frozenset())
    if name == "_pad_packed_sequence" and PACKED in found:
        return (found - {PACKED}) | {PADDED} if SORTED in found else found - {PACKED, PICKED}
    if (
        PADDED in found and _caller_in_torch() == "pad_packed_sequence"
    ):  # rows, or their lengths, go back to their places
        return found - {PICKED, SORTED, PADDED}
    if name == "index_select" and ROWS in found and _caller_in_torch() == "pack_padded_sequence":
        return found | {SORTED}
    return None


def _caller_in_torch() -> str | None:
    """The function of torch's that packs sequences and runs now."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(8):
        if frame is None:
            break
        if frame.f_code.co_filename.replace("\\", "/").endswith("torch/nn/utils/rnn.py"):
            return frame.f_code.co_name
        frame = frame.f_back
    return None


def _picks(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], by_python: bool) -> bool:
    """Whether a function picks entries of rows along the first dimension, by values that may differ the next time."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not x.ndim or not is_marked(x):
        return False
    if name == "__getitem__":
        index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        listed = isinstance(index, list) and by_python
        return (isinstance(index, Tensor) and _varies(index)) or listed or _is_of_numpy(index)
    if name in ("masked_select", "take"):
        return True
    if name == "roll":
        dims = kwargs.get("dims", args[2] if len(args) > 2 else 0)
        return by_python and 0 in (d % x.ndim for d in (dims if isinstance(dims, tuple | list) else (dims,)))
    dim = kwargs.get("dim", next((a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)), -1))
    if name == "topk":
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
    if name in _ORDERING or name in ("index_select", "gather", "take_along_dim"):
        along_rows = name == "msort" or dim % x.ndim == 0
        index = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, Tensor)), None)
        return along_rows and len(x) > 1 and (index is None or _varies(index))
    return False


def _varies(index: Tensor) -> bool:
    """An index that was counted up, or is a constant, picks the same entries every time; NumPy's may be drawn by chance."""
    return bool(marks(index) & {ROWS, CHANCE}) or (not _is_shared(index) and _is_memory_of_numpy(index))


def _is_of_numpy(x: Any) -> bool:
    return hasattr(x, "__array_interface__") and not isinstance(x, Tensor)


def _is_memory_of_numpy(x: Tensor) -> bool:
    """Whether a tensor was made by `torch.from_numpy`, which no mode hears of."""
    try:
        return x.device.type == "cpu" and not x.untyped_storage().resizable()
    except (RuntimeError, NotImplementedError):
        return False
