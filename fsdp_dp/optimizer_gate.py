"""Between engine and optimizers: nothing is stepped that was not released, nothing is released twice (rules 1, 9).

Releases happen in the step pre-hook that torch calls for every optimizer, so any ``torch.optim`` optimizer works
unchanged, and several may share a logical batch: the first step releases, each consumes its own parameters.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fsdp_dp.errors import PrivacyError


class OptimizerGate:
    """Watches every optimizer that holds a managed parameter.

    Args:
        parameters: canonical name -> managed parameter.
        release: makes all managed parameters' ``.grad`` private and reports each through `published`.
        discard: drops all that is pending.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], release: Callable[[], None], discard: Callable[[], None]
    ) -> None:
        self._parameters, self._release, self._discard = parameters, release, discard
        self._waiting: dict[str, Tensor] = {}
        self._stepped_since_release = False
        self._handles = [
            register_optimizer_step_pre_hook(_weakly(self, "before_step")),
            register_optimizer_step_post_hook(_weakly(self, "after_step")),
        ]
        self._owners: list[weakref.ref[Any]] = []
        self._marked: list[weakref.ref[Any]] = []

    @property
    def waiting(self) -> bool:
        """Whether a released gradient waits for its first step."""
        return bool(self._waiting) and not self._stepped_since_release

    def published(self, gradients: Mapping[str, Tensor]) -> None:
        self._waiting, self._stepped_since_release = dict(gradients), False

    def clear(self, names: Sequence[str] | None = None) -> None:
        """Take released gradients back: ``.grad`` is None until the next release."""
        for name in list(self._waiting) if names is None else names:
            if self._waiting.pop(name, None) is not None:
                self._parameters[name].grad = None

    def remove(self) -> None:
        self.clear()
        for handle in self._handles:
            handle.remove()
        for owner in (ref() for ref in self._owners):
            if owner is not None:
                del owner.zero_grad
        for optimizer in (ref() for ref in self._marked):
            if optimizer is not None:
                del optimizer._step_supports_amp_scaling

    def before_step(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        held = self._held_by(optimizer)
        if not held:
            return
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise PrivacyError(
                "optimizer.step(closure) may run the closure, and so the backward, more than once; call backward "
                "yourself and step() without a closure"
            )
        if any(getattr(optimizer, left, None) is not None for left in ("grad_scale", "found_inf")):
            refuse_grad_scaler()
        if self._is_state_initialization(held):
            return
        self.adopt(optimizer)
        for name in held:
            grad = self._parameters[name].grad
            if grad is not None and grad is not self._waiting.get(name):
                raise PrivacyError(
                    f"Parameter '{name}' has a .grad that the engine did not release; training with it would not be "
                    "private. Clear it with optimizer.zero_grad(), and let only the engine write gradients"
                )
        if not any(name in self._waiting for name in held):
            self._release()

    def _is_state_initialization(self, held: Sequence[str]) -> bool:
        """torch's distributed checkpoint steps a fresh optimizer on zero gradients to make its state: no release."""
        if self._waiting:
            return False
        grads = [self._parameters[name].grad for name in held]
        frame, called = sys._getframe(1), False
        while frame is not None and not called:
            called = frame.f_code.co_filename.replace("\\", "/").endswith("torch/distributed/checkpoint/state_dict.py")
            frame = frame.f_back  # type: ignore[assignment]
        return called and all(grad is None or not bool(grad.any()) for grad in grads)

    def after_step(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        held = self._held_by(optimizer)
        self._stepped_since_release |= bool(held)
        self.clear(held)

    def adopt(self, optimizer: Optimizer) -> None:
        """Check an optimizer and let its ``zero_grad`` discard. Raises PrivacyError for parameters nobody clips."""
        managed = {id(p) for p in self._parameters.values()}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        strangers = [tuple(p.shape) for p in held if (p.requires_grad or p.grad is not None) and id(p) not in managed]
        if strangers:
            raise PrivacyError(
                f"The optimizer holds {len(strangers)} trainable parameter(s) that this engine does not manage (shapes "
                f"{strangers[:3]}); they would be trained without privacy. Build the optimizer from model.parameters() "
                "after sharding, and give other models their own optimizer"
            )
        # GradScaler leaves the scale on optimizers that say they handle it, which tells its step from a plain one.
        if "_step_supports_amp_scaling" not in vars(optimizer):
            optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
            self._marked.append(weakref.ref(optimizer))
        self.adopt_zero_grad(optimizer)

    def adopt_zero_grad(self, owner: Any) -> None:
        """``owner.zero_grad()`` before a step drops pending sums, as it would drop gradients. After a step: nothing."""
        if any(ref() is owner for ref in self._owners):
            return
        original, discard = owner.zero_grad, weakref.WeakMethod(self._discard)  # type: ignore[arg-type]

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            drop = discard()
            if drop is not None:
                drop()

        owner.zero_grad = zero_grad
        self._owners.append(weakref.ref(owner))

    def _held_by(self, optimizer: Optimizer) -> list[str]:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name, parameter in self._parameters.items() if id(parameter) in ids]


def refuse_grad_scaler() -> None:
    raise PrivacyError(
        "GradScaler scales the loss, but clipping already sets the scale of a private gradient; train in bf16, or in "
        "fp16 without loss scaling: loss.backward(); optimizer.step()"
    )


def _weakly(gate: OptimizerGate, method: str) -> Callable[..., None]:
    """A global optimizer hook that does not keep the engine and its model alive."""
    ref = weakref.ref(gate)

    def hook(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        attached = ref()
        if attached is not None:
            getattr(attached, method)(optimizer, args, kwargs)

    return hook
