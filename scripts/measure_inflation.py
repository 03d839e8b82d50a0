"""What certified clipping costs and what the usual practice risks: the tables of docs/numerics.md.

    python scripts/measure_inflation.py                                   one to two minutes on two CPU cores
    python scripts/measure_inflation.py --device cuda --dtype bfloat16    tensor cores

Prints Markdown. *Inflation* is certified / true - 1: by so much less is a clipped row's contribution than R.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fsdp_dp.clipping import certified_norm, row_weights
from fsdp_dp.gradients import Materialized, OuterProduct, PerSampleGradient
from fsdp_dp.numerics import exact_arithmetic, un_noised_margin


class ByGram(OuterProduct):
    """Norms from two T x T Gram matrices, whatever the planner would choose."""

    uses_gram = True


class ByInstantiation(OuterProduct):
    """Norms from the gradient of each row, formed and dropped."""

    uses_gram = False


def stored(a: Tensor, g: Tensor) -> PerSampleGradient:
    """The gradient of each row, formed, measured and kept."""
    return Materialized(OuterProduct(a, g).dense())


PATHS: dict[str, Callable[[Tensor, Tensor], PerSampleGradient]] = {
    "gram": ByGram,
    "instantiated": ByInstantiation,
    "stored": stored,
}


def chosen_path(a: Tensor, g: Tensor) -> str:
    """The path that the library takes for a Linear with these factors."""
    factors = OuterProduct(a, g)
    if isinstance(factors.settle(), Materialized):
        return "stored"
    return "gram" if factors.uses_gram else "instantiated"


def independent(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return a, g


def mean_heavy(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of a row share most of their input and of their output gradient."""
    return 0.3 * a + a[:, :1], 0.3 * g + g[:, :1]


def cancelling(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A key projection: inputs share a large mean, output gradients add up to nearly zero."""
    return 0.3 * a + a[:, :1], g - g.mean(1, keepdim=True)


def one_dominating(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.ones(a.shape[1], 1, device=a.device)
    scale[0] = 100.0
    return a, g * scale


KINDS = {
    "independent": independent,
    "mean-heavy": mean_heavy,
    "cancelling": cancelling,
    "one dominating": one_dominating,
}


def tokens(kind: str, B: int, T: int, D: int, P: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T + D + P)
    a, g = (torch.randn(B, T, C, generator=generator).to(device) for C in (D, P))
    a, g = KINDS[kind](a, g)
    return a.to(dtype), g.to(dtype)


def true_norms(a: Tensor, g: Tensor) -> Tensor:
    return (g.double().mT @ a.double()).flatten(1).norm(dim=1)


def inflation(gradient: PerSampleGradient, true_norm: Tensor) -> tuple[float, float]:
    """Average inflation: of the norm alone, and with the rounding of the weighted sum."""
    terms = gradient.norm_terms()
    of_norm = (terms.norm_sq + terms.error).sqrt() / true_norm - 1
    return of_norm.mean().item(), (certified_norm(terms) / true_norm - 1).mean().item()


def inflation_rows(device: str, dtype: torch.dtype) -> Iterator[str]:
    yield "| Tokens | T | D x P | gram | instantiated | stored |"
    yield "|---|---|---|---|---|---|"
    shapes = [(T, *widths) for T in (64, 512, 1024) for widths in ((256, 256), (768, 3072), (2048, 2048))]
    cases = [("independent", *shape) for shape in [*shapes, (4096, 1024, 1024)]]
    others = [(64, 768, 768), (1024, 768, 768), (1024, 2048, 2304)]
    cases += [(kind, *shape) for kind in KINDS if kind != "independent" for shape in others]
    for kind, T, D, P in cases:
        a, g = tokens(kind, 2 if T < 4096 else 1, T, D, P, device, dtype)
        true_norm = true_norms(a, g)
        cells = []
        for path, make in PATHS.items():
            of_norm, total = inflation(make(a, g), true_norm)
            mark = "*" if path == chosen_path(a, g) else ""
            cells.append(f"{of_norm:.3%} + {total - of_norm:.3%}{mark}")
        yield f"| {kind} | {T} | {D} x {P} | {' | '.join(cells)} |"


def margin_rows(device: str, dtype: torch.dtype) -> Iterator[str]:
    """How the un-noised float32 sum changes when one row is added, besides that row's own contribution."""
    margin = un_noised_margin(torch.float32, torch.device(device))
    yield f"| Rows | B x T, microbatches | norm of the sum / R | change / R | share of the margin {margin:.1e} |"
    yield "|---|---|---|---|---|"
    for kind in ("independent", "aligned", "cancelling"):
        for B, T, microbatches in ((16, 128, 32), (64, 512, 2), (8, 1024, 8)):
            size, change = change_of_rounding(kind, B, T, microbatches, device, dtype)
            share = f"{change / margin:.0%}"
            yield f"| {kind} | {B} x {T}, {microbatches} | {size:.1f} | {change:.1e} | {share} |"


def change_of_rounding(
    kind: str, B: int, T: int, microbatches: int, device: str, dtype: torch.dtype
) -> tuple[float, float]:
    """Norm of the sum, and of (sum with the first row) - (sum without it) - (its contribution), for R = 1."""
    width = 256
    generator = torch.Generator().manual_seed(0)
    shared_a, shared_g = (torch.randn(width, generator=generator).to(device) for _ in range(2))
    with_row, without_row = (torch.zeros(width, width, device=device) for _ in range(2))
    contribution = torch.zeros(width, width, dtype=torch.float64, device=device)
    for microbatch in range(microbatches):
        a, g = (torch.randn(B, T, width, generator=generator).to(device) for _ in range(2))
        if kind == "aligned":
            a, g = 0.1 * a + shared_a, 0.1 * g + shared_g
        elif kind == "cancelling":
            a, g = 0.05 * a + shared_a, g - g.mean(1, keepdim=True)
        gradient = OuterProduct(a.to(dtype), g.to(dtype))
        keep = torch.ones(B, dtype=torch.bool, device=device)
        chosen = row_weights(
            gradient.norm_terms(), keep, bound=1.0, loss_factor=1, numerics="certified", dtype=torch.float32
        )
        with_row += gradient.weighted_sum(chosen.weight_B, keep)
        if microbatch == 0:
            keep = torch.arange(B, device=device) > 0
            g_0, a_0 = gradient.g_BTP[0].double(), gradient.a_BTD[0].double()
            contribution = chosen.weight_B[0].double() * (g_0.T @ a_0)
        without_row += gradient.weighted_sum(chosen.weight_B, keep)
    change = with_row.double() - without_row.double() - contribution
    return with_row.norm().item(), change.norm().item()


def folding_rows() -> Iterator[str]:
    """One row of bfloat16 tokens whose gradients nearly cancel, clipped in the field's usual way and in ours.

    All inputs are 1; 510 output gradients are 1, 340 are -1.5, one is 1/2. The row's gradient is 1/2 exactly, the
    tokens' absolute values add up to 1020.5.
    """
    values = [1.0] * 510 + [-1.5] * 340 + [0.5]
    g = torch.tensor(values, dtype=torch.bfloat16).view(1, -1, 1)
    a = torch.ones_like(g)
    norm = true_norms(a, g).item()
    folded, certified = [], []
    bounds = torch.linspace(norm / 2, norm, 257).tolist()
    for bound in bounds:
        scaled = (g * torch.tensor(bound / norm)).to(torch.bfloat16)
        folded.append((scaled.float().mT @ a.float()).norm().item() / bound)
        gradient, keep = OuterProduct(a, g), torch.ones(1, dtype=torch.bool)
        chosen = row_weights(
            gradient.norm_terms(), keep, bound=bound, loss_factor=1, numerics="certified", dtype=torch.float32
        )
        certified.append(gradient.weighted_sum(chosen.weight_B, keep).double().norm().item() / bound)
    worst = max(range(len(bounds)), key=lambda i: folded[i])
    yield "| c g rounded to | largest contribution / R | at R |"
    yield "|---|---|---|"
    yield f"| bfloat16, c = R / n with n exact | {folded[worst]:.2f} | {bounds[worst]:.4f} |"
    yield f"| float32, c = R / (n + e) | {max(certified):.4f} | any |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="format of the tokens")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    sections = {
        "Average inflation: norm + rounding of the sum; * is the path taken": inflation_rows(options.device, dtype),
        "One row more: how the rounding of the others changes": margin_rows(options.device, dtype),
        "One cancelling row, clipped by folding c into bfloat16": folding_rows(),
    }
    with exact_arithmetic(torch.device(options.device)):
        for title, rows in sections.items():
            print(f"\n{title} ({options.dtype} on {options.device})\n")
            for row in rows:
                print(row, flush=True)


if __name__ == "__main__":
    main()
