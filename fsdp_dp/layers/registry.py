"""The table from module type to layer rule, and the reasons for what is not in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fsdp_dp.gradients import PerSampleGradient

Rule = Callable[[nn.Module, Tensor, Tensor, frozenset[str]], dict[str, PerSampleGradient]]
Check = Callable[[nn.Module], str | None]

_RULES: dict[type[nn.Module], Rule] = {}
_CHECKS: dict[type[nn.Module], Check] = {}
_PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {}


def layer_rule(
    *types: type[nn.Module], parameters: tuple[str, ...] = ("weight", "bias"), check: Check = lambda module: None
) -> Callable[[Rule], Rule]:
    """Register a rule for exactly these types (a subclass may compute something else, so it is not covered).

    ``parameters`` are all that the rule knows; ``check(module)`` returns why an instance cannot be exact, or None.
    """

    def register(rule: Rule) -> Rule:
        for kind in types:
            _RULES[kind], _CHECKS[kind], _PARAMETERS[kind] = rule, check, parameters
        return rule

    return register


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The class of a layer as its author knows it: ``fully_shard`` on a layer puts a class of its own on top."""
    kind = type(module)
    others = [base for base in kind.__bases__ if base.__name__ != "FSDPModule"]
    return others[0] if len(kind.__bases__) == 2 and len(others) == 1 else kind


def has_rule(module: nn.Module) -> bool:
    return layer_type(module) in _RULES


def rule_for(module: nn.Module) -> Rule:
    return _RULES[layer_type(module)]


def supported() -> list[str]:
    """Names of the supported layers, for messages."""
    return sorted(kind.__name__ for kind in _RULES)


def unknown_parameters(module: nn.Module, owned: Iterable[str]) -> str | None:
    """Why a layer's additional parameters cannot be made private: its rule does not know them."""
    unknown = [name for name in owned if name not in _PARAMETERS[layer_type(module)]]
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
        return _CHECKS[layer_type(module)](module)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return (
            f"{kind} mixes the rows of a batch, so no row has a gradient of its own; "
            "use GroupNorm or LayerNorm, or freeze its parameters, if any, and keep it in eval mode"
        )
    base = next((b.__name__ for b in type(module).__mro__ if b in _RULES), None)
    if base:
        return (
            f"{kind} is a subclass of {base} and may compute something else; use {base} itself, or register a rule "
            "with fsdp_dp.layers.layer_rule"
        )
    return (
        f"{kind} has no layer rule (supported: {', '.join(supported())}); move its parameters into supported layers, "
        "freeze them with requires_grad_(False), or register a rule with fsdp_dp.layers.layer_rule"
    )
