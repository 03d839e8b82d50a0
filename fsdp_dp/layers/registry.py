"""The table from module type to layer rule, and the reasons for what is not in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from torch import nn

from fsdp_dp.gradients import PerSampleGradient
from fsdp_dp.records import Record

Rule = Callable[..., dict[str, PerSampleGradient]]
Check = Callable[[nn.Module], str | None]
AnyRule = TypeVar("AnyRule", bound=Rule)


@dataclasses.dataclass(frozen=True)
class _Entry:
    rule: Rule
    parameters: tuple[str, ...]
    check: Check
    keeps: Literal["first", "all"]


_ENTRIES: dict[type[nn.Module] | str, _Entry] = {}


def layer_rule(
    *types: type[nn.Module] | str,
    parameters: tuple[str, ...] = ("weight", "bias"),
    check: Check = lambda module: None,
    keeps: Literal["first", "all"] = "first",
) -> Callable[[AnyRule], AnyRule]:
    """Register a rule for exactly these types (a subclass may compute something else, so it is not covered).

    A type of a package that may be absent is given by name: ``"package.module.Class"``. ``parameters`` are all that the
    rule knows; ``check(module)`` returns why an instance cannot be exact, or None. The rule is called as
    ``rule(module, a, g, wanted)``, with the layer's first input and the gradient of its output, the batch in front; or,
    with ``keeps="all"``, as ``rule(module, record, wanted)`` with all that the layer was given.
    """

    def register(rule: AnyRule) -> AnyRule:
        for kind in types:
            _ENTRIES[kind] = _Entry(rule, parameters, check, keeps)
        return rule

    return register


def _entry(module: nn.Module) -> _Entry | None:
    kind = layer_type(module)
    return _ENTRIES.get(kind) or _ENTRIES.get(f"{kind.__module__}.{kind.__qualname__}")


def _known(module: nn.Module) -> _Entry:
    entry = _entry(module)
    assert entry is not None
    return entry


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The class of a layer as its author knows it: ``fully_shard`` on a layer puts a class of its own on top."""
    kind = type(module)
    others = [base for base in kind.__bases__ if base.__name__ != "FSDPModule"]
    return others[0] if len(kind.__bases__) == 2 and len(others) == 1 else kind


def has_rule(module: nn.Module) -> bool:
    return _entry(module) is not None


def rule_for(module: nn.Module) -> Rule:
    return _known(module).rule


def keeps(module: nn.Module) -> Literal["first", "all"]:
    """What a layer's tap must keep for its rule."""
    return _known(module).keeps


def per_sample_gradients(module: nn.Module, record: Record, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """What the rule of ``module`` makes of a record: ``{parameter name: gradient of every row}``."""
    entry = _known(module)
    arguments: tuple[Any, ...] = (record.a, record.g) if entry.keeps == "first" else (record,)
    return entry.rule(module, *arguments, wanted)


def supported() -> list[str]:
    """Names of the supported layers, for messages."""
    return sorted((kind if isinstance(kind, str) else kind.__name__).split(".")[-1] for kind in _ENTRIES)


def unknown_parameters(module: nn.Module, owned: Iterable[str]) -> str | None:
    """Why a layer's additional parameters cannot be made private: its rule does not know them."""
    unknown = [name for name in owned if name not in _known(module).parameters]
    if not unknown:
        return None
    return (
        f"the rule of {type(module).__name__} does not know its parameter(s) {', '.join(unknown)} (weight norm and other "
        "reparametrizations add such); remove them or freeze them"
    )


def refusal(module: nn.Module) -> str | None:
    """Why the parameters of ``module`` cannot be made private exactly, and what to do; None if they can."""
    kind = layer_type(module).__name__
    if "forward" in vars(module):
        return f"the forward of this {kind} was replaced on the instance, so its rule may not hold; make it a class"
    if has_rule(module):
        return _known(module).check(module)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return (
            f"{kind} mixes the rows of a batch, so no row has a gradient of its own; "
            "use GroupNorm or LayerNorm, or freeze its parameters, if any, and keep it in eval mode"
        )
    base = next((b.__name__ for b in type(module).__mro__ if b in _ENTRIES), None)
    if base:
        return (
            f"{kind} is a subclass of {base} and may compute something else; use {base} itself, or register a rule "
            "with fsdp_dp.layers.layer_rule"
        )
    return (
        f"{kind} has no layer rule (supported: {', '.join(supported())}); move its parameters into supported layers, "
        "freeze them with requires_grad_(False), or register a rule with fsdp_dp.layers.layer_rule"
    )
