"""Which layers are tapped: every managed parameter lies in a layer with a rule, or the model is refused by name."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_dp.attention import is_attention, projections, refusal_of_attention
from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.layers import has_rule, refusal, unknown_parameters
from fsdp_dp.parts import Part
from fsdp_dp.recurrence import is_recurrent, products, refusal_of_recurrence
from fsdp_dp.sharding.base import ManagedParameter, ShardedModel, canonical_name
from fsdp_dp.taps import Bare


def tapped_layers(model: ShardedModel) -> tuple[dict[str, nn.Module], list[Bare]]:
    """Canonical name -> layer, for every layer that owns a managed parameter; and the parameters outside of layers.

    Raises:
        UnsupportedModelError: naming every module that cannot be exact, why, and what to do.
    """
    layers: dict[str, nn.Module] = {}
    bare: list[Bare] = []
    problems = []
    owners = {module: [a for m, a in model.names if m is module] for module, _ in model.names}
    for module_name, module in model.root.named_modules():
        used = module in owners or (is_attention(module) and module.out_proj in owners)
        if not used and not _is_training_batch_norm(module):
            continue
        name = canonical_name(module_name + ".").rstrip(".")
        parts, reason = _parts(module)
        if parts:
            layers |= _placed(name, module, parts, model)
            problems += [f"  '{name}': {reason}"] if reason else []
            continue
        if not has_rule(module) and (next(module.children(), None) is not None or _is_bare(module)):
            bare += [Bare(model.names[module, attribute], module, attribute) for attribute in owners[module]]
            continue
        layers[name] = module
        reason = refusal(module) or unknown_parameters(module, owners.get(module, []))
        if reason is not None:
            owned = ", ".join(owners.get(module, [])) or "none trainable"
            problems.append(f"  '{name or type(module).__name__}' (parameters: {owned}): {reason}")
    problems += [f"  '{p.name}': {reason}" for p in model.parameters for reason in [_unfit(p)] if reason]
    if problems:
        raise UnsupportedModelError("This model cannot be made private exactly:\n" + "\n".join(problems))
    if not model.parameters:
        raise UnsupportedModelError("The model has no trainable parameter (all have requires_grad=False)")
    return layers, bare


_FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _unfit(parameter: ManagedParameter) -> str | None:
    """Why no gradient of this parameter can be clipped, whatever its layer."""
    if parameter.numel == 0:
        return "it has no elements, so there is nothing to train; freeze it (requires_grad_(False))"
    if parameter.parameter.dtype not in _FORMATS:
        return (
            f"it is {parameter.parameter.dtype}, expected one of {', '.join(map(str, _FORMATS))}; keep complex numbers as "
            "pairs (torch.view_as_complex in forward), or freeze it"
        )
    return None


def _parts(module: nn.Module) -> tuple[Mapping[str, Part], str | None]:
    """What a module that torch computes as a whole is made of, none if it is not one; and why it cannot be."""
    if is_attention(module):
        return projections(module), refusal_of_attention(module)
    if is_recurrent(module):
        return products(module), refusal_of_recurrence(module)
    return {}, None


def _placed(name: str, module: nn.Module, parts: Mapping[str, Part], model: ShardedModel) -> dict[str, nn.Module]:
    """Parts as layers, which are further places of the module's parameters."""
    layers: dict[str, nn.Module] = {}
    for part_name, part in parts.items():
        layers[f"{name}.{part_name}".lstrip(".")] = part
        for attribute, own in (("weight", part.weight_name), ("bias", part.bias_name)):
            if own is not None and (module, own) in model.names:
                model.names[part, attribute] = model.names[module, own]
    return layers


_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
_CALLS_LAYERS = frozenset({"peft.tuners.lora.dora.DoraLinearLayer"})
"""Modules without children that are given layers to call, so that their forward cannot be run again alone."""


def _is_bare(module: nn.Module) -> bool:
    """Whether the parameters of a module without children are followed through what is done with them."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}
    return isinstance(module, _CONTAINERS) or bool(names & _CALLS_LAYERS)


def _is_training_batch_norm(module: nn.Module) -> bool:
    """Batch norm couples rows even when its own parameters are frozen, unless it uses stored statistics."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return module.training or module.running_mean is None


def refuse_training_batch_norm(batch_norms: Sequence[nn.Module]) -> None:
    """Frozen batch norm is fine only while it stays in eval mode; ``model.train()`` undoes that."""
    training = next((module for module in batch_norms if _is_training_batch_norm(module)), None)
    if training is not None:
        raise UnsupportedModelError(
            f"A {type(training).__name__} is in training mode: it mixes the rows of the batch and stores their statistics. "
            "After model.train(), call .eval() on frozen batch norm layers, or use GroupNorm"
        )


def refuse_strangers(model: ShardedModel) -> None:
    """Parameters that became trainable, or joined the model, after the engine was attached would be trained as they are."""
    names = model.names_by_identity
    present = (p for module in model.tree.modules() for p in module._parameters.values() if id(p) not in names)
    if any(p is not None and p.requires_grad for p in present):
        trainable = ((name, p) for name, p in model.root.named_parameters() if p.requires_grad)
        for name in (name for name, p in trainable if id(p) not in names):
            raise PrivacyError(
                f"Parameter '{canonical_name(name)}' became trainable after the engine was attached, so its gradient "
                "would not be private. Call state = engine.state_dict(), engine.detach(), make_private(...) and "
                "load_state_dict(state), so that releases stay counted"
            )
    for (module, attribute), name in model.names.items():
        value = module._parameters.get(attribute)
        now = name if value is None else names.get(id(value))
        if now is None:
            raise PrivacyError(
                f"Parameter '{name}' was replaced by another one after the engine was attached, so its gradient would go to "
                "one that is no longer used. Write to it (weight.data.copy_) between logical batches, or attach again"
            )
        if now != name:
            raise PrivacyError(
                f"Parameter '{name}' was tied to '{now}' after the engine was attached, so its gradient would go to a "
                "parameter that is no longer used. Tie weights before make_private"
            )


def refuse_trainable_inputs(inputs: Iterable[Tensor]) -> None:
    """Raises UnsupportedModelError if the rows come from parameters in front of the model, which nobody would clip."""
    nodes = [x if x.is_leaf else x.grad_fn for x in inputs if x.requires_grad]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = node if isinstance(node, Tensor) else getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            raise UnsupportedModelError(
                f"An input of the model comes from a trainable parameter of shape {tuple(leaf.shape)} that is not in the "
                "model (an encoder, a prompt, a generator): its gradient would not be private. Put it into the model, or "
                "detach what it gives"
            )
        nodes.extend(before for before, _ in getattr(node, "next_functions", ()))


_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def refuse_attached(root: nn.Module) -> None:
    """Two engines on one layer would each see only a part of a row's gradient."""
    if any(module in _ATTACHED for module in root.modules()):
        raise PrivacyError(
            "make_private: this model, or a part of it, already has a privacy engine; call its engine.detach() first"
        )


def mark_attached(layers: Iterable[nn.Module]) -> None:
    _ATTACHED.update(layers)


def unmark_attached(layers: Iterable[nn.Module]) -> None:
    _ATTACHED.difference_update(set(layers))
