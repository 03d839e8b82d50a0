"""Clipping groups: which parameters share a bound, and how the bound of the whole is divided among them (rule 13).

Pure functions of names and sizes. A row's gradient is clipped group by group, each to its own R_k; the whole is then at
most ``sqrt(sum_k R_k^2) = R``, which is the sensitivity that the noise is made for.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What grouping looks at in one parameter: its name, its block (an FSDP unit, say), its elements over all ranks."""

    name: str
    block: str
    numel: int

    @property
    def layer(self) -> str:
        return self.name.rpartition(".")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are clipped together: no row's gradient of these is longer than ``bound``."""

    name: str
    bound: float
    parameters: tuple[str, ...]


def clipping_groups(
    places: Sequence[Place],
    *,
    clipping: str | Mapping[str, str],
    bounds: str | Mapping[str, float],
    max_grad_norm: float,
) -> list[Group]:
    """The groups of a model, in the order in which their last parameters are listed in ``places``.

    Args:
        places: the managed parameters, in registration order.
        clipping: "flat", "block", "layer", "parameter", or patterns of names -> groups (the first that fits counts).
        bounds: "uniform" (R/sqrt(K)), "dimension" (proportional to the square root of the elements), or group -> bound.
        max_grad_norm: R.

    Raises:
        ValueError: a parameter is in no group, a pattern decides about no parameter, or given bounds do not make up R.

    **Formal guarantee.** ``sqrt(sum_k R_k^2) <= R (1 + 1e-9)``, and every parameter is in exactly one group.
    """
    members: dict[str, list[Place]] = {}
    for place, group in zip(places, _group_names(places, clipping), strict=True):
        members.setdefault(group, []).append(place)
    chosen = _bounds(
        {name: sum(p.numel for p in of_group) for name, of_group in members.items()}, bounds, max_grad_norm
    )
    last = {name: max(places.index(p) for p in of_group) for name, of_group in members.items()}
    return [
        Group(name=name, bound=chosen[name], parameters=tuple(p.name for p in members[name]))
        for name in sorted(members, key=last.__getitem__)
    ]


def _group_names(places: Sequence[Place], clipping: str | Mapping[str, str]) -> list[str]:
    if isinstance(clipping, Mapping):
        return _matched(places, clipping)
    return {
        "flat": ["all"] * len(places),
        "block": [p.block for p in places],
        "layer": [p.layer for p in places],
        "parameter": [p.name for p in places],
    }[clipping]


def _matched(places: Sequence[Place], patterns: Mapping[str, str]) -> list[str]:
    fitting = [[pattern for pattern in patterns if fnmatch.fnmatchcase(p.name, pattern)] for p in places]
    outside = [p.name for p, found in zip(places, fitting, strict=True) if not found]
    if outside:
        raise ValueError(
            f"clipping: no pattern fits parameter '{outside[0]}' ({len(outside)} in all), and every trainable parameter must "
            f"be clipped in some group. Patterns: {', '.join(patterns)}. End with '*' for all the others"
        )
    idle = [pattern for pattern in patterns if pattern != "*" and all(found[0] != pattern for found in fitting)]
    if idle:
        rivals = dict.fromkeys(found[0] for found in fitting if idle[0] in found)
        raise ValueError(
            f"clipping: pattern '{idle[0]}' "
            + (
                f"has no effect, since '{next(iter(rivals))}' stands before it and the first that fits counts; put it first"
                if rivals
                else f"fits no trainable parameter (they are named like '{places[0].name}'); correct it"
            )
            + " or leave it out"
        )
    return [patterns[found[0]] for found in fitting]


def _bounds(numel: Mapping[str, int], bounds: str | Mapping[str, float], max_grad_norm: float) -> dict[str, float]:
    if isinstance(bounds, Mapping):
        return _given_bounds(list(numel), bounds, max_grad_norm)
    shares = dict.fromkeys(numel, 1) if bounds == "uniform" else numel
    total = sum(shares.values())
    return {name: max_grad_norm * math.sqrt(share / total) for name, share in shares.items()}


def _given_bounds(names: Sequence[str], bounds: Mapping[str, float], max_grad_norm: float) -> dict[str, float]:
    if set(names) != set(bounds):
        missing, unknown = sorted(set(names) - set(bounds)), sorted(set(bounds) - set(names))
        raise ValueError(
            (
                f"group_bounds: found none for {missing[:5]}"
                if missing
                else f"group_bounds: no group is named {unknown[:5]}"
            )
            + f"; found bounds for {sorted(bounds)[:5]}, and each of the groups {sorted(names)[:5]} needs one"
        )
    total = math.sqrt(sum(bound**2 for bound in bounds.values()))
    if not math.isclose(total, max_grad_norm, rel_tol=1e-9):
        raise ValueError(
            f"group_bounds: together sqrt(sum of squares) = {total:.10g}, but max_grad_norm={max_grad_norm:g} is the bound "
            f"of the whole, which the noise is made for. Set max_grad_norm={total:.10g}, or scale the bounds"
        )
    return {name: float(bounds[name]) for name in names}


def groups_of_blocks(groups: Sequence[Group], unit_of: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Groups that can wait for each other without keeping records for long: those inside of one block of the model.

    A block is a unit below which no other unit lies; the layers of others, as embeddings and head, are a whole backward
    apart. In the order in which backward is expected to finish them: from the last to the first.
    """
    inside = groups_inside_blocks(groups, unit_of)
    together: dict[tuple[object, ...], list[int]] = {}
    for number, group in enumerate(groups):
        key = ("unit", unit_of[group.parameters[0]]) if number in inside else ("group", number)
        together.setdefault(key, []).append(number)
    return sorted(map(tuple, together.values()), key=lambda batch: -batch[0])


def groups_inside_blocks(groups: Sequence[Group], unit_of: Mapping[str, int]) -> frozenset[int]:
    """Those all of whose parameters are in one block, of a model that has more than one."""
    paths = _paths(unit_of)
    outer = {
        unit
        for unit, path in paths.items()
        for other, its in paths.items()
        if other != unit and its[: len(path)] == path
    }
    units = [{unit_of[name] for name in group.parameters} for group in groups]
    if len(paths) == 1:
        return frozenset()
    return frozenset(number for number, own in enumerate(units) if len(own) == 1 and not own & outer)


def _paths(unit_of: Mapping[str, int]) -> dict[int, list[str]]:
    """Unit -> the path that all its parameters share."""
    paths: dict[int, list[str]] = {}
    for name, unit in unit_of.items():
        path = name.split(".")[:-1]
        paths[unit] = _common_start(paths.get(unit, path), path)
    return paths


def blocks_of_units(unit_of: Mapping[str, int]) -> dict[str, str]:
    """Parameter -> name of its FSDP unit: the path that all parameters of the unit share, ``"root"`` where that is none."""
    paths = _paths(unit_of)
    names = {unit: ".".join(path) or "root" for unit, path in paths.items()}
    unique = {
        unit: name if list(names.values()).count(name) == 1 else f"{name} ({unit})" for unit, name in names.items()
    }
    return {name: unique[unit] for name, unit in unit_of.items()}


def _common_start(x: Sequence[str], y: Sequence[str]) -> list[str]:
    same = [a == b for a, b in zip(x, y, strict=False)]
    return list(x[: same.index(False) if False in same else len(same)])
