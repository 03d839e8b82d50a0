"""`torch.func.vmap` over rows, without its advice on speed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch


def by_row(
    function: Callable[..., Any], *, in_dims: Any = 0, randomness: Literal["error", "same"] = "error"
) -> Callable[..., Any]:
    """``function`` of one row as a function of all rows; those are the first dimension unless ``in_dims`` says otherwise."""
    of_all = torch.func.vmap(function, in_dims=in_dims, randomness=randomness)

    def quietly(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop because", UserWarning)
            return of_all(*args)

    return quietly
