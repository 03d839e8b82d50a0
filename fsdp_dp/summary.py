"""`PrivacyEngine.summary()`: the mechanism, the layers and the communication, for people."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from fsdp_dp.layers.registry import layer_type
from fsdp_dp.methods import Measured, inflation

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
    kinds = kinds_of_layers(engine)
    lines = [
        f"  layers           {len(engine.layers)}, of {len(kinds)} kinds; {engine.model.global_numel:,} trainable elements"
    ]
    lines += [f"    {line}" for line in _aligned([_HEADER, *(kind.cells(engine.measured) for kind in kinds)])]
    if not engine.measured:
        return [*lines, "    (methods and slack are known after the first backward)"]
    return [*lines, *(f"    {line}" for line in _legend(engine.measured.values()))]


_HEADER = ("count", "layer", "trained", "elements", "method", "norm cost", "kept a row", "slack")
_METHODS = {
    "gram": "from inner products",
    "store": "a row's gradient is kept",
    "round": "so is one rounded to bfloat16, and measured then",
    "rows": "so are a table's rows that it used",
    "recompute": "computed twice",
}


def _legend(measured: Collection[Measured]) -> list[str]:
    """What the columns say, and their totals."""
    used = {part for m in measured for part in m.method.split(" + ")}
    slack, kept = inflation(measured), _size(sum(m.kept for m in measured))
    whole = "" if slack is None else f"; of a whole row {_percent(slack)}"
    return [
        "method: " + "; ".join(f"{name} ({what})" for name, what in _METHODS.items() if name in used),
        "norm cost: in products as large as that of the layer's own weight gradient",
        f"kept a row: by one layer, until its group's norms are known; by all {kept}",
        f"slack: by how much certified norms exceed computed ones{whole}. From private rows: not private",
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Layers that look the same in print, and whose gradients are measured in the same way."""

    layer: str
    trained: str
    elements: int
    method: str
    members: tuple[tuple[str, ...], ...]
    """The parameters of each layer of this kind."""

    def cells(self, measured: Mapping[str, Measured]) -> tuple[str, ...]:
        """A line of the table."""
        of_layer = [[measured[name] for name in names if name in measured] for names in self.members]
        found = [m for of_one in of_layer for m in of_one]
        line = (str(len(self.members)), self.layer, self.trained, f"{self.elements:,}", self.method)
        slack = inflation(found)
        if slack is None:
            return (*line, "", "", "")
        kept = sum(m.kept for m in found) / len(self.members)
        return (*line, f"{max(m.cost for m in found):.2f}", _size(kept), _percent(slack))


def kinds_of_layers(engine: PrivacyEngine) -> list[Kind]:
    """In the order of the model; parameters outside of layers are a kind of their own."""
    layer_of = {module: layer for layer, module in engine.layers.items()}
    owned: dict[str, list[tuple[str, str]]] = {layer: [] for layer in engine.layers}
    uses = Counter(engine.model.names.values())
    for (module, attribute), name in engine.model.names.items():
        owned.setdefault(layer_of.get(module, name), []).append((attribute, name))
    kinds: dict[tuple[str, str, str], list[tuple[str, ...]]] = {}
    for layer, parameters in owned.items():
        names = tuple(name for _, name in parameters)
        methods = dict.fromkeys(engine.measured[name].method for name in names if name in engine.measured)
        printed = _printed(engine.layers[layer]) if layer in engine.layers else "parameter of a module with children"
        trained = (
            ", ".join(f"{a} (tied)" if uses[name] > 1 else a for a, name in parameters)
            if layer in engine.layers
            else ""
        )
        kinds.setdefault((printed, trained, " + ".join(methods)), []).append(names)
    numel = {p.name: p.numel for p in engine.model.parameters}
    return [
        Kind(
            layer=layer,
            trained=trained,
            elements=sum(numel[name] for names in members for name in names),
            method=method,
            members=tuple(members),
        )
        for (layer, trained, method), members in kinds.items()
    ]


def _printed(layer: nn.Module) -> str:
    """A layer as torch prints it, without its children, defaults, and what sharding adds to its class's name."""
    own = repr(layer) if next(layer.children(), None) is None else f"{type(layer).__name__}({layer.extra_repr()})"
    own = own.replace(type(layer).__name__, layer_type(layer).__name__, 1)
    for default in (", elementwise_affine=True", ", bias=True", "in_features=", "out_features="):
        own = own.replace(default, "")
    return own


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _communication(engine: PrivacyEngine) -> list[str]:
    model = engine.model
    lines = [f"  sharding         {model.kind}, {model.data_size} data-parallel rank(s)"]
    lines += [f"    each microbatch  {what}" for what in model.communication()]
    return lines
