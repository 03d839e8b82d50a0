"""`PrivacyEngine.summary()`: the mechanism, the layers and the communication, for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fsdp_dp.layers.registry import layer_type

if TYPE_CHECKING:
    from fsdp_dp.engine import PrivacyEngine


def describe(engine: PrivacyEngine) -> str:
    """A page about an engine. Counts of rows in it are private statistics and say so (rule 16)."""
    lines = ["fsdp_dp privacy engine", *_mechanism(engine), *_model(engine), *_communication(engine)]
    dropped = int(engine.nonfinite_rows)
    if dropped:
        lines.append(f"  not private      {dropped} row(s) with non-finite gradients were zeroed on this rank")
    return "\n".join(lines)


def _mechanism(engine: PrivacyEngine) -> list[str]:
    p = engine.privacy
    sigma = engine.noise_multiplier
    spent = "no noise: epsilon is infinite" if sigma == 0 else f"{engine.steps} release(s) so far"
    lines = [
        f"  mechanism        Gaussian, noise_multiplier {sigma:.6g}, max_grad_norm {p.max_grad_norm:g}; {spent}",
        f"  sampling         {p.sampling}, rate {p.sample_rate:.3g} = {p.expected_batch_size} of {p.dataset_size} rows"
        + ("" if p.max_batch_size is None else f", at most {p.max_batch_size}"),
        f"  clipping         {p.clipping}, {p.clip_function}, {p.numerics} numerics; a row is clipped to "
        f"{engine.row_bound:.8g}",
        *_groups(engine),
        f"  accountant       {p.accountant}, delta {p.target_delta:g}",
    ]
    if not engine.vouched:
        lines.append("  epsilon          none: rows did not come from engine.loader")
    if engine.seeded:
        lines.append("  seed fixed: no privacy guarantee")
    return lines


def _groups(engine: PrivacyEngine) -> list[str]:
    lines = []
    if len(engine.groups) > 1:
        low, high = min(engine.bounds), max(engine.bounds)
        each = f"{low:.4g} each" if high - low < 1e-9 * high else f"{low:.4g} to {high:.4g}"
        lines.append(f"                   in {len(engine.groups)} groups, bounds {each}")
    if engine.privacy.adaptive_bounds is not None:
        lines.append(
            f"                   adaptive: now {engine.max_grad_norm:.4g} in all; gradients get noise multiplier "
            f"{engine.gradient_noise_multiplier:.6g} so that the noised counts cost no epsilon"
        )
    return lines


def _model(engine: PrivacyEngine) -> list[str]:
    kinds = Counter(layer_type(module).__name__ for module in engine.layers.values())
    tapped = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return [f"  layers           {tapped}; {engine.model.global_numel:,} trainable elements"]


def _communication(engine: PrivacyEngine) -> list[str]:
    model = engine.model
    lines = [f"  sharding         {model.kind}, {model.data_size} data-parallel rank(s)"]
    if model.data_size > 1:
        lines.append(
            f"  communication    as FSDP: a reduce-scatter (SUM, {engine.dtype}) for each of {model.unit_count} units"
        )
    if model.split_group is not None:
        lines.append("                   plus one all-reduce of [3, B] norms over the tensor-parallel ranks")
    return lines
