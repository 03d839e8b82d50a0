"""Compiled kernels over (a, g) against float64: weighted sums, ghost norms and their bounds, norm layers.

tests/unit/test_outer_kernels.py runs the Triton ones in the interpreter; here are the compiled ones, the one scheduled by
hand for Hopper, and the bounds on the rounding of real tensor cores.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp.clipping import certified_norm
from fsdp_dp.gradients import OuterProduct, PerSampleGradient
from fsdp_dp.kernels import outer, tiles
from fsdp_dp.layers import per_sample_gradients
from fsdp_dp.numerics import exact_arithmetic
from fsdp_dp.records import NO_CALL, Record
from fsdp_dp.together import total_norm_terms
from fsdp_dp.vector_gradients import SumOverPositions, formed

pytestmark = pytest.mark.gpu(count=1)
DEVICE = torch.device("cuda", 0)
# (B, T, D, P): rows of an odd number of positions, widths that are no multiple of a tile, one of everything.
SHAPES = [(3, 100, 520, 264), (2, 197, 256, 136), (1, 1, 72, 64), (4, 1024, 2048, 1000), (2, 130, 64, 9000)]
HALVES = [torch.bfloat16, torch.float16]


def factors(B: int, T: int, D: int, P: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return tuple(torch.randn(B, T, C, generator=generator, device=DEVICE).to(dtype) for C in (D, P))  # type: ignore[return-value]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def wanted(a: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    kept = weight != 0
    return torch.einsum("b,btp,btd->pd", weight[kept].double(), g[kept].double(), a[kept].double())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("by_hand", [True, False])
def test_weighted_sums(dtype: torch.dtype, by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a row that holds NaN and weighs nothing, and weights that differ by 2^80."""
    from fsdp_dp.kernels import weighted_outer

    if not outer.usable(*factors(1, 8, 8, 8, dtype)):
        pytest.skip("the kernels are for Hopper")
    if by_hand and not tiles.hand_scheduled(DEVICE):
        pytest.skip("not tried with this Triton")
    monkeypatch.setattr(weighted_outer, "hand_scheduled", lambda device: by_hand)
    for shape in SHAPES:
        a, g = factors(*shape, dtype)
        weight = torch.rand(shape[0], device=DEVICE) + 0.1
        if shape[0] > 2:
            weight[1], a[1], g[1, 0, 0] = 0.0, torch.nan, torch.inf
            weight[0], g[0] = 2.0**-40, g[0] * 2.0**10
            weight[2] = 2.0**40
        out = torch.full((shape[3], shape[2]), torch.nan, device=DEVICE)
        assert off(outer.weighted_outer(a, g, weight, out), wanted(a, g, weight)) < 2e-5
        if shape[3] % 2 == 0:
            bucket = torch.full((2, shape[3] // 2 * shape[2] + 64), torch.nan, device=DEVICE)
            slices = bucket[:, 64:].unflatten(1, (-1, shape[2]))
            outer.weighted_outer(a, g, weight, slices)
            assert torch.equal(slices.flatten(0, 1), out) and bucket[:, :64].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weighted_sums_together(dtype: torch.dtype) -> None:
    """Of the Linears of a block, and more than one launch takes, as alone; twice, with other values and other memory."""
    if not outer.usable(*factors(1, 8, 8, 8, dtype)):
        pytest.skip("the kernels are for Hopper")
    shapes = [(256, 256), (256, 512), (1024, 264), (264, 1024), (8, 8), (512, 256), (256, 256), (2048, 1024), (136, 72)]
    for seed in range(2):
        torch.manual_seed(seed)
        weight = torch.rand(3, device=DEVICE)
        pairs = [factors(3, 100 + 28 * number, D, P, dtype) for number, (D, P) in enumerate(shapes)]
        found = outer.weighted_outers([(a, g, None) for a, g in pairs], weight)
        for (a, g), x in zip(pairs, found, strict=True):
            assert off(x, wanted(a, g, weight)) < 2e-5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("part", [0, 2])
def test_what_stands_in_accumulators_is_added_to_a_slice(
    dtype: torch.dtype, by_hand: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And to no other; slices end within tiles. Not to every sum of a launch; twice, with other values."""
    from fsdp_dp.kernels import weighted_outer

    if not outer.usable(*factors(1, 8, 8, 8, dtype)):
        pytest.skip("the kernels are for Hopper")
    if not by_hand:
        monkeypatch.setattr(weighted_outer, "hand_scheduled", lambda device: False)
    slices, shapes = 4, [(256, 512), (520, 264), (1024, 2048), (64, 8)]
    for seed in range(2):
        torch.manual_seed(seed)
        weight = torch.rand(3, device=DEVICE)
        pairs = [factors(3, 200, D, P, dtype) for D, P in shapes]
        places = [torch.full((slices, P // slices * D + 64), torch.nan, device=DEVICE) for D, P in shapes]
        outs = [x[:, 64:].unflatten(1, (-1, D)) for x, (D, _) in zip(places, shapes, strict=True)]
        onto = [torch.randn(P // slices, D, device=DEVICE) for D, P in shapes]
        onto_some = [None if number == 1 else x for number, x in enumerate(onto)]
        sums = [(a, g, out) for (a, g), out in zip(pairs, outs, strict=True)]
        outer.weighted_outers(sums, weight, None, onto_some, part)
        for number, ((a, g), out, place) in enumerate(zip(pairs, outs, places, strict=True)):
            expected = wanted(a, g, weight).view(out.shape)
            if onto_some[number] is not None:
                expected[part] += onto[number].double()
            assert off(out, expected) < 2e-5 and place[:, :64].isnan().all()
            assert (out.double() - expected).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("by_hand", [True, False])
def test_each_sum_has_the_weights_of_its_owner(
    dtype: torch.dtype, by_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows of which are zero for one owner and not for another."""
    from fsdp_dp.kernels import weighted_outer

    if not outer.usable(*factors(1, 8, 8, 8, dtype)):
        pytest.skip("the kernels are for Hopper")
    if not by_hand:
        monkeypatch.setattr(weighted_outer, "hand_scheduled", lambda device: False)
    pairs = [factors(3, 100, D, P, dtype) for D, P in [(256, 256), (256, 512), (8, 8), (512, 256)]]
    weight = torch.rand(3, 3, device=DEVICE)
    weight[0, 1] = weight[2, 0] = 0.0
    owners = [2, 0, 1, 2]
    found = outer.weighted_outers([(a, g, None) for a, g in pairs], weight, owners)
    for (a, g), x, owner in zip(pairs, found, owners, strict=True):
        assert off(x, wanted(a, g, weight[owner])) < 2e-5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ghost_norms_together(dtype: torch.dtype) -> None:
    """Of the inputs of a block and more, as alone."""
    sizes = [
        (96, 256, [256, 64, 64]),
        (96, 256, [256]),
        (96, 256, [512, 512]),
        (200, 512, [256]),
        (40, 64, [72]),
        (96, 64, [8] * 9),
    ]
    inputs = [
        (factors(3, T, D, 8, dtype)[0], [factors(3, T, 8, P, dtype)[1] for P in widths]) for T, D, widths in sizes
    ]
    if not outer.usable(inputs[0][0], inputs[0][1][0]):
        pytest.skip("the kernels are for Hopper")
    norms, alone = outer.GhostNorms(3, DEVICE), []
    norms.add(inputs)
    for a, gs in inputs:
        for g in gs:
            one = outer.GhostNorms(3, DEVICE)
            one.add([(a, [g])])
            alone.append(one.terms().sum(0))
    torch.testing.assert_close(norms.terms().sum(0), sum(alone), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["independent", "cancelling", "one row of NaN"])
def test_ghost_norms_and_their_bounds(dtype: torch.dtype, kind: str) -> None:
    for B, T, D, P in [
        (3, 100, 520, 264),
        (2, 197, 2048, 2304),
        (1, 1, 72, 64),
        (2, 1024, 2048, 5504),
        (1, 130, 64, 9000),
    ]:
        a, g = factors(B, T, D, P, dtype)
        if kind == "cancelling":
            a, g = (0.3 * a + a[:, :1]), (g - g.mean(1, keepdim=True))
        gs = [g, g.roll(1, 1), g[..., : P // 16 * 8].contiguous(), g * 2]
        gradients = [OuterProduct(a, x) for x in gs]
        if not all(x.in_fused_gram for x in gradients):
            continue
        exact = sum((x.double().mT @ a.double()).square().sum((1, 2)) for x in gs)
        terms = total_norm_terms(gradients, B, DEVICE)
        assert ((terms.norm_sq - exact).abs() <= terms.error).all()
        assert (certified_norm(terms) >= exact.sqrt()).all()
        alone = gradients[0].norm_terms()
        for x in gradients[1:]:
            alone += x.norm_terms()
        torch.testing.assert_close(alone.stack(), terms.stack(), rtol=1e-9, atol=0)
        if kind == "one row of NaN":
            a[-1, T // 2, 0] = torch.nan
            assert torch.isfinite(certified_norm(total_norm_terms(gradients, B, DEVICE))).tolist() == [True] * (
                B - 1
            ) + [False]


@pytest.mark.parametrize(
    "shape", [(2, 1024, 2048, 2048), (2, 1024, 2048, 5504), (1, 1024, 4096, 11008), (1, 1024, 2048, 32000)]
)
def test_inflation_is_below_one_percent(shape: tuple[int, int, int, int]) -> None:
    a, g = factors(*shape, torch.bfloat16)
    gradient = OuterProduct(a, g)
    if not gradient.in_fused_gram:
        pytest.skip("the kernels are for Hopper")
    exact = torch.stack([(g[i].double().T @ a[i].double()).norm() for i in range(shape[0])])
    inflation = (certified_norm(gradient.norm_terms()) / exact - 1).mean().item()
    print(f"inflation {shape}: {inflation:.4%}")
    assert 0 < inflation < 0.01


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.RMSNorm])
def test_norm_layers(dtype: torch.dtype, layer: type[nn.Module]) -> None:
    for B, T, C in [(3, 100, 520), (1, 1, 8), (2, 1024, 4096), (2, 65, 1023)]:
        a, g = factors(B, T, C, C, dtype)
        a = a + 1
        module = layer(C, device=DEVICE)
        with exact_arithmetic(DEVICE):
            found = per_sample_gradients(
                module, Record(NO_CALL, (a,), (g,)), frozenset(n for n, _ in module.named_parameters())
            )
        normalize = F.layer_norm if layer is nn.LayerNorm else F.rms_norm
        x = normalize(a.double(), (C,), eps=module.eps or torch.finfo(torch.float32).eps)
        assert off(found["weight"].dense(), (x * g.double()).sum(1)) < 2e-6
        if "bias" in found:
            assert off(found["bias"].dense(), g.double().sum(1)) < 2e-6


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_vectors_of_a_unit(dtype: torch.dtype) -> None:
    """A GPT-2 block's, whose biases are wider than a tile; twice, with other values where the first were."""
    for B, T, C in [(20, 100, 1280), (2, 1024, 520), (1, 1, 8)]:
        for seed in range(2):
            a, g = factors(B, T, C, C, dtype, seed)
            _, wide = factors(B, T, 8, 4 * C, dtype, seed)
            layers: dict[str, PerSampleGradient] = {
                "bias": SumOverPositions(wide),
                "scale": SumOverPositions(g, a, 1e-5, True),
                "shift": SumOverPositions(g),
                "other": SumOverPositions(g, a, 1e-5, False),
            }
            _, (joint,) = formed(layers)
            made = joint.apart()
            x, y = F.layer_norm(a.double(), (C,), eps=1e-5), F.rms_norm(a.double(), (C,), eps=1e-5)
            assert off(made["bias"].dense(), wide.double().sum(1)) < 2e-6
            assert off(made["scale"].dense(), (x * g.double()).sum(1)) < 2e-6
            assert off(made["shift"].dense(), g.double().sum(1)) < 2e-6
            assert off(made["other"].dense(), (y * g.double()).sum(1)) < 2e-6


def test_a_vocabulary_of_any_size() -> None:
    a, g = factors(3, 40, 64, 50_257, torch.bfloat16)
    gradient = OuterProduct(a, g)
    if not outer.usable(a, a):
        pytest.skip("the kernels are for Hopper")
    assert gradient.in_fused_gram
    weight = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    assert off(gradient.weighted_sum(weight, weight > 0), wanted(a, g, weight)) < 2e-5
    norm_sq = torch.einsum("btp,btd->bpd", g.double(), a.double()).square().sum((1, 2))
    terms = gradient.norm_terms()
    assert ((terms.norm_sq - norm_sq).abs() <= terms.error).all()
    assert (terms.error <= 0.05 * norm_sq).all()
