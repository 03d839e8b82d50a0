"""`check_private`: can this model, with this loss, be trained privately? A readable verdict before a run (rule 8).

Nothing is judged here that the engine does not judge itself: one without noise is attached to the model, run on the
batch and taken off again. What this adds is brute force: each of a few rows is run backward alone, and the engine's
norms and clipped sum must be those.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fsdp_dp.config import LossReduction, PrivacyConfig
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.sharding.base import canonical_name
from fsdp_dp.summary import kinds_of_layers

LossFn = Callable[[nn.Module, Any], Tensor]
Gradients = dict[str, Tensor]
Status = Literal["ok", "not shown", "REFUSED"]

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_COARSE_TOLERANCE = 5e-2
_ON_TRUST = "taken on trust"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer to one question; ``text`` says why, and for a refusal what to do."""

    question: str
    status: Status
    text: str

    def __str__(self) -> str:
        first, *rest = self.text.splitlines()
        return "\n".join([f"  {self.question:<13}{self.status:<11}{first}", *(f"{'':26}{line}" for line in rest)])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All findings; `ok` unless something is refused. What could not be shown is said, as the engine says it."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.status != "REFUSED" for finding in self.findings)

    def __str__(self) -> str:
        head = "check_private: " + ("this can be trained privately" if self.ok else "REFUSED")
        return "\n".join([head, *map(str, self.findings)])


def check_private(
    model: nn.Module, batch: Any, loss_fn: LossFn, *, loss_reduction: LossReduction = "mean", brute_force_rows: int = 4
) -> Verdict:
    """Ask the four questions of private training of a model; it is left as it was.

    * coverage: is every trainable parameter in exactly one layer whose per-row gradients are known?
    * loss, rows: does a row's gradient depend on that row alone?
    * norms, clipped sum: are they those of brute force, for a few rows?

    Args:
        model: on one device, before it is sharded, in the mode in which it is trained.
        batch: tensors, in any structure, with the rows in front; at least two rows, and they should differ.
        loss_fn: from the model and a batch to the scalar loss.
        loss_reduction: how it reduces rows, as in `PrivacyConfig`.
        brute_force_rows: rows that are run backward alone.

    Raises:
        ValueError: the model is sharded, or the batch holds no rows.
    """
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    if not _rows(batch):
        raise ValueError("check_private: the batch holds no tensor with a row; give tensors with the batch in front")
    findings = _step(model, batch, loss_fn, loss_reduction)
    if all(finding.status != "REFUSED" for finding in findings):
        findings += _brute_force(model, _first(batch, brute_force_rows), loss_fn, loss_reduction)
    return Verdict(findings=tuple(findings))


# ------------------------------------------------------------------------------------------------------- the questions


def _step(model: nn.Module, batch: Any, loss_fn: LossFn, loss_reduction: LossReduction) -> list[Finding]:
    """Attach an engine, run a step, and stop at what it refuses: coverage, a loss that couples rows, a model that does."""
    question, findings = "coverage", list[Finding]()
    try:
        with _engine(model, loss_reduction=loss_reduction) as engine, _caught_warnings() as caught:
            _refuse_sharded(engine)
            question = "loss"
            loss_fn(model, batch).backward()
            findings.append(_coverage(engine))
            question = "rows"
            engine.privatize()
            shown = engine.rows_are_independent
    except (UnsupportedModelError, PrivacyError) as error:
        return [*findings, Finding(question=question, status="REFUSED", text=str(error))]
    return [*findings, _loss_finding(caught), _rows_finding(shown, _rows(batch))]


def _refuse_sharded(engine: PrivacyEngine) -> None:
    if engine.model.data_size > 1 or engine.model.kind != "single device":
        raise ValueError(
            f"check_private: the model is sharded ({engine.model.kind}); check it before, on one device: what the engine "
            "does with a row does not depend on the sharding"
        )


def _coverage(engine: PrivacyEngine) -> Finding:
    """Every trainable parameter, as the model has them, is one that the engine manages; and by which layers, how."""
    trained = sorted(id(p) for p in engine.model.root.parameters() if p.requires_grad)
    once = trained == sorted(id(p.parameter) for p in engine.model.parameters)
    text = f"{'each' if once else 'NOT each'} of {len(trained)} trainable parameters exactly once"
    unused = [p.name for p in engine.model.parameters if p.name not in engine.measured]
    if unused:
        text += f"; not reached from this loss: {', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}"
    kinds = [
        f"{len(kind.members):>3} {kind.layer}{', ' * bool(kind.trained)}{kind.trained}: {kind.method or 'not reached'}"
        for kind in kinds_of_layers(engine)
    ]
    return Finding(question="coverage", status="ok" if once else "REFUSED", text="\n".join([text, *kinds]))


def _rows_finding(shown: bool, rows: int) -> Finding:
    if not shown:
        text = "nothing could be seen: at least two rows that differ, with gradients, are needed"
        return Finding(question="rows", status="not shown", text=text)
    text = f"exchanging every second of {rows} rows moved no other row's gradient of any parameter"
    return Finding(question="rows", status="ok", text=text)


def _loss_finding(caught: list[str]) -> Finding:
    if caught:
        return Finding(question="loss", status="not shown", text="\n".join(caught))
    text = "exchanging rows' outputs and labels moved no other row's gradient"
    return Finding(question="loss", status="ok", text=text)


def _brute_force(model: nn.Module, batch: Any, loss_fn: LossFn, loss_reduction: LossReduction) -> list[Finding]:
    with _repeatable(model, batch, loss_fn) as how:
        if how is None:
            text = (
                "the forward draws random numbers even in evaluation mode, so a row alone is not what it is in a batch"
            )
            return [Finding(question="norms", status="not shown", text=text)]
        expected = [_row_gradients(model, _row(batch, i), loss_fn) for i in range(_rows(batch))]
        norms = torch.stack([_norm(gradients) for gradients in expected])
        bound = max(float(norms.median()), 1e-30)
        with _engine(model, max_grad_norm=bound, loss_reduction=loss_reduction) as engine, _caught_warnings():
            loss_fn(model, batch).backward()
            found = engine.per_sample_norms.to(norms)
            engine.privatize()
            released = {canonical_name(n): p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    tolerance = min((_TOLERANCE.get(p.dtype, _COARSE_TOLERANCE) for p in model.parameters()), default=1.0)
    tolerance = max(tolerance, _COARSE_TOLERANCE) if torch.is_autocast_enabled(norms.device.type) else tolerance
    compared = _compare_norms(found, norms, tolerance, how)
    if compared.status != "ok" and all(_other_reduction(ratio, len(norms)) for ratio in (found / norms).tolist()):
        return [compared]  # the sum is off by as much, whichever layer it is off in most
    return [compared, _compare_sums(released, expected, norms, bound, tolerance)]


def _compare_norms(found: Tensor, norms: Tensor, tolerance: float, how: str) -> Finding:
    off = (found - norms).abs() / torch.maximum(norms, 1e-3 * norms.max()).clamp(min=1e-30)
    worst = int(off.argmax())
    text = f"{len(norms)} rows run backward alone{how}: off by {float(off[worst]):.1g} at most"
    if off[worst] <= tolerance:
        return Finding(question="norms", status="ok", text=text)
    text = (
        f"row {worst} run backward alone{how} has a gradient of norm {float(norms[worst]):.6g}, the engine found "
        f"{float(found[worst]):.6g}.\n{_reason(float(found[worst] / norms[worst]), len(norms))}"
    )
    return Finding(question="norms", status="REFUSED", text=text)


def _reason(ratio: float, rows: int) -> str:
    return _other_reduction(ratio, rows) or (
        "The loss of a row alone must be its part of the batch's; if it is, report this model: it must not be trained"
    )


def _other_reduction(ratio: float, rows: int) -> str | None:
    """What to say where a norm is off by just what `loss_reduction` makes of it."""
    if abs(ratio - rows) < 1e-2 * rows:
        return "That is the number of rows too large: the loss is a sum over rows; say loss_reduction='sum'"
    if abs(ratio * rows - 1) < 1e-2:
        return "That is the number of rows too small: the loss is a mean over rows; say loss_reduction='mean'"
    return None


def _compare_sums(
    released: Gradients, expected: list[Gradients], norms: Tensor, bound: float, tolerance: float
) -> Finding:
    factors = (bound / norms.clamp(min=1e-30)).clamp(max=1).tolist()
    sums = {name: sum(f * g[name] for f, g in zip(factors, expected, strict=True)) for name in expected[0]}
    whole = max(float(_norm(sums)), 1e-30)  # type: ignore[arg-type]
    off = {name: float((released.get(name, torch.zeros_like(s)) - s).norm()) / whole for name, s in sums.items()}
    worst = max(off, key=off.__getitem__)
    text = f"at the median norm {bound:.3g}: off by {off[worst]:.1g} at most"
    if off[worst] <= tolerance:
        return Finding(question="clipped sum", status="ok", text=text)
    text = f"{text}, in parameter '{worst}'.\nThe engine is wrong about the layer of that parameter: report this model"
    return Finding(question="clipped sum", status="REFUSED", text=text)


# ------------------------------------------------------------------------------------------------------------- its tools


@contextmanager
def _engine(
    model: nn.Module, max_grad_norm: float = 1.0, loss_reduction: LossReduction = "mean"
) -> Iterator[PrivacyEngine]:
    """An engine without noise; norms are compared as computed, without the slack of certified ones."""
    privacy = PrivacyConfig(
        max_grad_norm=max_grad_norm, noise_multiplier=0.0, expected_batch_size=1, dataset_size=2, target_delta=1e-5,
        sampling="external_poisson", loss_reduction=loss_reduction, numerics="nominal",
    )  # fmt: skip
    engine = PrivacyEngine(model, privacy, alone=True)  # in a job of several processes each checks for itself
    try:
        yield engine
    finally:
        engine.detach()


@contextmanager
def _caught_warnings() -> Iterator[list[str]]:
    """What is taken on trust; other warnings go on."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
        texts += [str(w.message) for w in caught if _ON_TRUST in str(w.message)]
    for w in caught:
        if _ON_TRUST not in str(w.message):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


@contextmanager
def _repeatable(model: nn.Module, batch: Any, loss_fn: LossFn) -> Iterator[str | None]:
    """In a mode without random numbers: as it is, or in evaluation mode; yields how that is said, None if in neither."""
    modes = {module: module.training for module in model.modules()}
    try:
        if _is_deterministic(model, batch, loss_fn):
            yield ""
        else:
            model.eval()
            yield ", in evaluation mode" if _is_deterministic(model, batch, loss_fn) else None
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def _is_deterministic(model: nn.Module, batch: Any, loss_fn: LossFn) -> bool:
    return torch.equal(loss_fn(model, batch), loss_fn(model, batch))


def _row_gradients(model: nn.Module, row: Any, loss_fn: LossFn) -> Gradients:
    parameters = {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss_fn(model, row), list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if g is None else g.double()
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def _norm(gradients: Gradients) -> Tensor:
    return torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()


def _rows(batch: Any) -> int:
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 0)


def _first(batch: Any, count: int) -> Any:
    return _part(batch, slice(0, count))


def _row(batch: Any, i: int) -> Any:
    return _part(batch, slice(i, i + 1))


def _part(batch: Any, part: slice) -> Any:
    rows = _rows(batch)
    return tree_map(lambda x: x[part] if isinstance(x, Tensor) and x.ndim and len(x) == rows else x, batch)
