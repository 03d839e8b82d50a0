"""Compiled kernels that form the gradient of every row, against float64: dropped with a bound, or stored and summed.

tests/unit/test_instantiate_kernels.py runs the Triton ones in the interpreter; here are the compiled ones, the one
scheduled by hand for Hopper, and the bounds on the rounding of real tensor cores.
"""

import pytest
import torch
from torch import Tensor

from fsdp_dp.clipping import certified_norm
from fsdp_dp.kernels import outer, tiles
from fsdp_dp.norm_terms import NormTerms

pytestmark = pytest.mark.gpu(count=1)
DEVICE = torch.device("cuda", 0)
# (B, T, D, P): no multiple of a tile or of a stretch, one of everything, many stretches, more tiles than multiprocessors.
SHAPES = [(3, 100, 520, 264), (2, 1197, 256, 136), (1, 1, 72, 64), (2, 1024, 2048, 2048), (1, 8200, 1024, 2304)]
# Fewer stages than one warpgroup is ahead of the other, as many, and more; several tiles a program.
SHORT = [(40, T, 520, 264) for T in (1, 64, 65, 128, 129, 192, 193, 256, 320)]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["by Triton", "by hand"], autouse=True)
def by_hand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsdp_dp.kernels import instantiate

    if not outer.usable(*factors(1, 8, 8, 8, torch.bfloat16)):
        pytest.skip("the kernels are for Hopper")
    if request.param and not tiles.hand_scheduled(DEVICE):
        pytest.skip("not tried with this Triton")
    monkeypatch.setattr(instantiate, "hand_scheduled", lambda device: request.param)


def factors(B: int, T: int, D: int, P: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return tuple(torch.randn(B, T, C, generator=generator, device=DEVICE).to(dtype) for C in (D, P))  # type: ignore[return-value]


def exact(a: Tensor, g: Tensor) -> Tensor:
    """``[B, P, D]`` float64."""
    return torch.stack([y.double().T @ x.double() for x, y in zip(a, g, strict=True)])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["independent", "cancelling", "one row of NaN"])
def test_norms_of_what_is_dropped(dtype: torch.dtype, kind: str) -> None:
    for shape in SHAPES:
        a, g = factors(*shape, dtype)
        if kind == "cancelling":
            a, g = (0.3 * a + a[:, :1]), (g - g.mean(1, keepdim=True))
        pairs = [(a, g), (a, g * 2), (a[..., : shape[2] // 16 * 8], g)]
        found = outer.instantiated_norms(pairs)
        for (x, y), stacked in zip(pairs, found, strict=True):
            terms, norm_sq = NormTerms.unstack(stacked), exact(x, y).square().sum((1, 2))
            assert ((terms.norm_sq - norm_sq).abs() <= terms.error).all()
            assert (certified_norm(terms) >= norm_sq.sqrt()).all()
            if kind == "independent":
                torch.testing.assert_close(terms.norm_sq, norm_sq, rtol=1e-4, atol=0)
            assert torch.equal(stacked, outer.instantiated_norms([(x, y)])[0])  # alone, and again
        if kind == "one row of NaN":
            a[-1, shape[1] // 2, 0] = torch.nan
            terms = NormTerms.unstack(outer.instantiated_norms([(a, g)])[0])
            assert torch.isfinite(certified_norm(terms)).tolist() == [True] * (shape[0] - 1) + [False]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_stored_is_what_was_measured_and_is_summed(dtype: torch.dtype, kept: torch.dtype) -> None:
    for shape in SHAPES + SHORT:
        a, g = factors(*shape, dtype)
        stored, squares = outer.stored_rows(a, g, kept)
        terms, wanted = NormTerms.unstack(outer.stored_norms([(stored, squares)])[0]), exact(a, g)
        eps = 2.0**-9 if kept == torch.bfloat16 else 2e-5
        assert ((stored.double() - wanted).norm(dim=(1, 2)) <= eps * wanted.norm(dim=(1, 2))).all()
        norm_sq = stored.double().square().sum((1, 2))
        assert ((terms.norm_sq - norm_sq).abs() <= terms.error).all() and (terms.error <= 1e-4 * norm_sq).all()
        weight = torch.rand(shape[0], device=DEVICE) + 0.1
        if shape[0] > 2:
            weight[1], stored[1] = 0.0, torch.nan
        of_kept = weight != 0
        summed = torch.einsum("b,bpd->pd", weight[of_kept].double(), stored[of_kept].double())
        out = outer.weighted_rows(stored, weight)
        assert (out.double() - summed).norm() <= 1e-6 * summed.norm()
        bucket = torch.full((2, shape[3] // 2 * shape[2] + 64), torch.nan, device=DEVICE)
        slices = bucket[:, 64:].unflatten(1, (-1, shape[2]))
        outer.weighted_rows(stored, weight, slices)
        assert torch.equal(slices.flatten(0, 1), out) and bucket[:, :64].isnan().all()
        standing = torch.randn(shape[3] // 2, shape[2], device=DEVICE)
        outer.weighted_rows(stored, weight, slices, standing, 1)
        assert torch.equal(slices[0], out[: shape[3] // 2])
        assert (slices[1] - standing - out[shape[3] // 2 :]).norm() <= 1e-6 * (standing.norm() + out.norm())


def test_inflation_of_long_rows() -> None:
    """Of the norm; the rounding of the weighted sum is another term."""
    for T in (4096, 8192, 16384):
        a, g = factors(1, T, 2048, 2048, torch.bfloat16)
        terms = NormTerms.unstack(outer.instantiated_norms([(a, g)])[0])
        norm = exact(a, g).norm(dim=(1, 2))
        inflation = ((terms.norm_sq + terms.error).sqrt() / norm - 1).item()
        print(f"inflation of the norm, {T} positions: {inflation:.4%}")
        assert 0 < inflation < 0.01
