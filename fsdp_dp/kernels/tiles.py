"""What the kernels over (a, g) share: how large their tiles are, where a program's tile lies."""

# Triton's jit reads no annotations but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """``rows x columns`` of the result, ``depth`` terms at a time, by this many warps, loads so many stages ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@functools.cache
def hand_scheduled(device: torch.device) -> bool:
    """Whether `hopper` has been tried on this device and with this Triton: its language is still experimental."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and triton.__version__.startswith("3.6.")
    )


@triton.jit
def padded_tile(program, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column of a program's tile, neighbours close together."""
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = program // (GROUP * tiles_across)
    height = min(tiles_down - group * GROUP, GROUP)
    place = program % (GROUP * tiles_across)
    return (group * GROUP + place % height) * ROWS, place // height * COLUMNS
