"""The table from module type to layer rule, and the reasons for what is not in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from torch import nn

from fsdp_dp.gradients import PerSampleGradient
from fsdp_dp.graph_identity import untapped
from fsdp_dp.layers.fingerprints import fingerprint
from fsdp_dp.records import ALL_LAYOUTS, Layout, Record

Rule = Callable[..., dict[str, PerSampleGradient]]
Check = Callable[[nn.Module], str | None]
AnyRule = TypeVar("AnyRule", bound=Rule)


@dataclasses.dataclass(frozen=True)
class _Entry:
    rule: Rule
    parameters: tuple[str, ...] | None
    check: Check
    keeps: Literal["first", "all"]
    layouts: tuple[Layout, ...]
    unbatched: Callable[[nn.Module], int] | None


_ENTRIES: dict[type[nn.Module] | str, _Entry] = {}
_BY_FORWARD: dict[str, _Entry] = {}
_ANY_LEAF: list[_Entry] = []


def layer_rule(
    *types: type[nn.Module] | str,
    parameters: tuple[str, ...] = ("weight", "bias"),
    check: Check = lambda module: None,
    keeps: Literal["first", "all"] = "first",
    layouts: tuple[Layout, ...] = ALL_LAYOUTS,
    unbatched: Callable[[nn.Module], int] | None = None,
) -> Callable[[AnyRule], AnyRule]:
    """Register a rule for these types, and for subclasses that override nothing of what they do.

    A type of a package that may be absent is given by name: ``"package.module.Class"``. ``parameters`` are all that the
    rule knows; ``check(module)`` returns why an instance cannot be exact, or None; ``layouts`` are where the layer's rows
    can be; ``unbatched(module)``, of a layer that has entries in front and then their channels, how many dimensions an
    input of one entry has (0: there is no such input). The rule is called as ``rule(module, a, g, wanted)``, with the
    layer's first input and the gradient of its output, the batch in front; or, with ``keeps="all"``, as
    ``rule(module, record, wanted)`` with all that the layer was given.
    """

    def register(rule: AnyRule) -> AnyRule:
        for kind in types:
            _ENTRIES[kind] = _Entry(rule, parameters, check, keeps, layouts, unbatched)
        return rule

    return register


def forward_rule(*fingerprints: str) -> Callable[[AnyRule], AnyRule]:
    """Register a rule of layers with nothing but a ``weight``, whose forward says just this (see `fingerprints`)."""

    def register(rule: AnyRule) -> AnyRule:
        for text in fingerprints:
            _BY_FORWARD[text] = _Entry(rule, ("weight",), lambda module: None, "first", ALL_LAYOUTS, None)
        return rule

    return register


def rule_of_any_leaf(rule: AnyRule) -> AnyRule:
    """Register what is done with modules without children that have no rule of their own."""
    _ANY_LEAF[:] = [_Entry(rule, None, _why_not_as_a_leaf, "all", ALL_LAYOUTS, None)]
    return rule


def _entry(module: nn.Module) -> _Entry | None:
    """The rule made for a module's type, or for a base that the type changes nothing of."""
    kind = layer_type(module)
    if kind in _ENTRIES:
        return _ENTRIES[kind]
    for base in kind.__mro__:
        entry = _ENTRIES.get(base) or _ENTRIES.get(f"{base.__module__}.{base.__qualname__}")
        if entry is not None:
            return entry if _computes_the_same(kind, base) else None
    if "_norm" in vars(module):  # a part of what the class's forward says, which this layer does otherwise
        return None
    return _BY_FORWARD.get(fingerprint(kind) or "")


_HARMLESS = frozenset("__init__ reset_parameters _reset_parameters extra_repr from_pretrained reset __doc__ __module__ "
                      "__qualname__ __annotations__ __firstlineno__ __static_attributes__ __annotate_func__ "
                      "__annotations_cache__ __constants__ __parameters__ __abstractmethods__ _abc_impl".split())  # fmt: skip


def _computes_the_same(kind: type, base: type) -> bool:
    """Whether a subclass overrides nothing that its base's forward could use; new names cannot be reached from there."""
    known = {name for ancestor in base.__mro__ for name in vars(ancestor)} | {"weight", "bias"}
    return all(
        name not in known or name in _HARMLESS
        for derived in kind.__mro__[: kind.__mro__.index(base)]
        for name in vars(derived)
    )


def _known(module: nn.Module) -> _Entry:
    return _entry(module) or _ANY_LEAF[0]


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The class of a layer as its author knows it: taps, and ``fully_shard`` on it, put a class of their own on top."""
    kind = untapped(type(module))
    others = [base for base in kind.__bases__ if base.__name__ != "FSDPModule"]
    return others[0] if len(kind.__bases__) == 2 and len(others) == 1 else kind


def has_rule(module: nn.Module) -> bool:
    return _entry(module) is not None


def layouts(module: nn.Module) -> tuple[Layout, ...]:
    """Where the rows of a layer's records can be."""
    return _known(module).layouts


def has_entries(module: nn.Module, dimensions: int) -> bool:
    """Whether an input of so many dimensions has entries in front, which the layer must not take for channels."""
    unbatched = _known(module).unbatched
    return unbatched is not None and dimensions != unbatched(module)


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


def supported() -> dict[str, str]:
    """Name of every layer with a rule, and what the rule does: the first line of its text."""
    return {_name(kind): _first_line(entry.rule) for kind, entry in sorted(_ENTRIES.items(), key=lambda e: _name(e[0]))}


def refused() -> dict[str, str]:
    """Name of every family of layers that is refused, and why."""
    return {types[0].__name__.lstrip("_"): reason for types, reason in _REFUSED.items()}


def _name(kind: type[nn.Module] | str) -> str:
    name = kind if isinstance(kind, str) else getattr(kind, "documented_as", kind.__name__)
    return str(name).split(".")[-1]


def _first_line(rule: Rule) -> str:
    return (rule.__doc__ or "").strip().split("\n")[0]


def unknown_parameters(module: nn.Module, owned: Iterable[str]) -> str | None:
    """Why a layer's additional parameters cannot be made private: its rule does not know them."""
    known = _known(module).parameters
    unknown = [name for name in owned if known is not None and name not in known]
    if not unknown:
        return None
    return (
        f"the rule of {type(module).__name__} does not know its parameter(s) {', '.join(unknown)} (weight norm and other "
        "reparametrizations add such); remove them or freeze them"
    )


def refusal(module: nn.Module) -> str | None:
    """Why the parameters of ``module`` cannot be made private exactly, and what to do; None if they can."""
    if "forward" in vars(module):
        kind = layer_type(module).__name__
        return f"the forward of this {kind} was replaced on the instance, so its rule may not hold; make it a class"
    return _known(module).check(module)


def _why_not_as_a_leaf(module: nn.Module) -> str | None:
    kind = layer_type(module).__name__
    for types, reason in _REFUSED.items():
        if isinstance(module, types):
            return f"{kind} {reason}"
    hooks = [hook for hook in module._forward_pre_hooks.values() if not _is_of_torch_distributed(hook)]
    if hooks:
        return (
            f"{kind} has no layer rule, and a forward pre-hook that may compute its parameters (weight norm, spectral norm), "
            "which running its forward again would leave out; remove the hook, or use torch.nn.utils.parametrizations"
        )
    return None


_REFUSED: dict[tuple[type[nn.Module], ...], str] = {
    (nn.modules.batchnorm._BatchNorm,): (
        "mixes the rows of a batch, so no row has a gradient of its own; use fsdp_dp.replace_batch_norm(model), which puts "
        "GroupNorm in its place, or freeze its parameters, if any, and keep it in eval mode"
    ),
    (nn.RNNBase,): (
        "is recurrent inside one fused kernel, where the gradient of a step cannot be recorded, and has a forward of its "
        "own, so that no loop can stand for it; use nn.LSTM, nn.GRU or nn.RNN as they are, or a loop over a cell"
    ),
}  # fmt: skip


def _is_of_torch_distributed(hook: Callable[..., Any]) -> bool:
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", "")).startswith(("torch.distributed", "fsdp_dp"))
