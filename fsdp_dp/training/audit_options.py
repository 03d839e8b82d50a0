"""What `fsdp_dp.audit` is asked to do, checked before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from fsdp_dp.auditing import reach
from fsdp_dp.config import require_choice, require_integer, require_number
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.training.schema import TrainConfig

KINDS = ("gradient", "data")


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """The canaries, and how sure to be.

    Args:
        canaries: how many; each takes part by a fair coin.
        kind: of a `gradient` of their own, or `data`: random bytes, scored by how much their loss falls.
        norm: of the gradient of a gradient canary, in units of privacy.max_grad_norm; above 1 it must be clipped. One that
            is too short or not finite shows nothing.
        rows: ordinary rows beside them; null takes all.
        delta: at which epsilons are compared; null takes privacy.target_delta. A smaller one makes the audit stronger.
        confidence: of the lower bound.
        seed: of coins and bytes; null takes them from the operating system.
    """

    canaries: int = 1000
    kind: str = "gradient"
    norm: float = 10.0
    rows: int | None = None
    delta: float | None = None
    confidence: float = 0.999
    seed: int | None = None

    def __post_init__(self) -> None:
        require_integer("audit.canaries", self.canaries, at_least=8)
        require_choice("audit.kind", self.kind, KINDS)
        require_number("audit.norm", self.norm, at_least=1e-2, at_most=1e6)
        require_number("audit.confidence", self.confidence, above=0.5, below=1.0)
        if self.rows is not None:
            require_integer("audit.rows", self.rows, at_least=0)
        if self.delta is not None:
            require_number("audit.delta", self.delta, above=0.0, below=1.0)
        if self.seed is not None:
            require_integer("audit.seed", self.seed, at_least=0)


@dataclass(frozen=True, kw_only=True)
class AuditConfig(TrainConfig):
    """A run of `fsdp_dp.train`, and how it is audited."""

    audit: AuditOptions = field(default_factory=AuditOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.privacy.private:
            raise ValueError(
                "privacy=none claims no epsilon, so there is nothing to audit: choose privacy=eps8, eps3 or eps1."
            )
        if self.resume:
            raise ValueError("resume=true is for fsdp_dp.train: an audit is one run from its start, so leave it out.")
        if not isinstance(self.model, GPTConfig) or self.data.tokenizer is not None:
            raise ValueError(
                "An audit inserts canaries of bytes into a text, for model.architecture=gpt or llama and without "
                f"data.tokenizer, found {self.model.architecture} and {self.data.tokenizer}."
            )
        self._check_reach()

    def _check_reach(self) -> None:
        """Raise ValueError if nothing could be found, whatever the engine does."""
        options = self.audit
        delta = self.privacy.target_delta if options.delta is None else options.delta
        half = [i % 2 == 0 for i in range(options.canaries)]
        if reach(half, delta=delta, confidence=options.confidence) == 0:
            raise ValueError(
                f"audit.canaries={options.canaries} cannot show an epsilon above 0 at delta {delta:g} and confidence "
                f"{options.confidence:g}, however broken the engine is: raise audit.canaries, or lower audit.delta or "
                "audit.confidence."
            )
