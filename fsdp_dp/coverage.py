"""Which layers are tapped: every managed parameter lies in a layer with a rule, or the model is refused by name."""

from __future__ import annotations

from torch import Tensor, nn

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.layers import refusal
from fsdp_dp.sharding.base import ShardedModel, canonical_name


def tapped_layers(model: ShardedModel) -> dict[str, nn.Module]:
    """Canonical name -> layer, for every layer that owns a managed parameter.

    Raises:
        UnsupportedModelError: naming every module that cannot be exact, why, and what to do.
    """
    layers, problems = {}, []
    owners = {module: [a for m, a in model.names if m is module] for module, _ in model.names}
    for module_name, module in model.root.named_modules():
        if module not in owners and not _is_training_batch_norm(module):
            continue
        name = canonical_name(module_name + ".").rstrip(".")
        layers[name] = module
        reason = refusal(module)
        if reason is not None:
            owned = ", ".join(owners.get(module, [])) or "none trainable"
            problems.append(f"  '{name or type(module).__name__}' (parameters: {owned}): {reason}")
    if problems:
        raise UnsupportedModelError("This model cannot be made private exactly:\n" + "\n".join(problems))
    if not model.parameters:
        raise UnsupportedModelError("The model has no trainable parameter (all have requires_grad=False)")
    return layers


def _is_training_batch_norm(module: nn.Module) -> bool:
    """Batch norm couples rows even when its own parameters are frozen, unless it uses stored statistics."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return module.training or module.running_mean is None


def check_rows(layer: str, rows: int, a: Tensor, g: Tensor) -> None:
    """Both records of a layer must have the batch as their first dimension."""
    for what, x in (("input", a), ("output gradient", g)):
        if x.ndim == 0 or x.shape[0] != rows:
            raise UnsupportedModelError(
                f"Layer '{layer}': its {what} has shape {tuple(x.shape)}, but the microbatch has {rows} rows, so its "
                "gradient cannot be told apart by row. Give every layer an input whose first dimension is the batch "
                "(for position ids: torch.arange(T).expand(batch, T))"
            )
