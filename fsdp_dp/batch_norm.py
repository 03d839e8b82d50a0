"""GroupNorm in the place of batch normalisation, which mixes rows and so leaves none a gradient of its own."""

from __future__ import annotations

from torch import nn


def replace_batch_norm(model: nn.Module, groups: int = 32) -> nn.Module:
    """Put a GroupNorm in the place of every BatchNorm and SyncBatchNorm, in the model itself. Before it is sharded.

    Scales and shifts carry over, as the same parameters; running statistics are dropped, so a pretrained model computes
    something else until it is trained on.

    Args:
        model: whose modules are replaced.
        groups: at most so many groups of channels; fewer where a group would have less than four.

    Returns:
        The model, or what takes its place if it is a batch norm itself.
    """
    made: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                if child not in made:
                    made[child] = _group_norm(child, groups)
                setattr(module, name, made[child])
    return _group_norm(model, groups) if isinstance(model, nn.modules.batchnorm._BatchNorm) else model


def _group_norm(norm: nn.modules.batchnorm._BatchNorm, groups: int) -> nn.GroupNorm:
    channels = norm.num_features
    count = max(g for g in range(1, max(1, min(groups, channels // 4)) + 1) if channels % g == 0)
    new = nn.GroupNorm(count, channels, eps=norm.eps, affine=False)
    new.affine, new.weight, new.bias = norm.affine, norm.weight, norm.bias
    return new.train(norm.training)
