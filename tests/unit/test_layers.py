"""Layer rules, against the module itself: each row run alone in float64, its gradients from autograd.

A docstring says "Seen to fail" where the property was broken on purpose and the test was seen to find it.

Legend: B rows, T positions, D inputs, P outputs, V vocabulary.
"""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fsdp_dp import patches, recurrence  # noqa: F401
from fsdp_dp.attention import Projection
from fsdp_dp.gradients import IndexedRows, Materialized, OuterProduct, PerSampleGradient
from fsdp_dp.layers import (
    convolution,
    layer_rule,
    leaf,
    refusal,
    refused,
    registry,
    rule_for,
    supported,
    unknown_parameters,
)
from fsdp_dp.layers.registry import has_rule
from fsdp_dp.patches import PatchProduct

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Stored sums are float32, of what half precision recorded exactly.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def indices(*shape: int, below: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


class Conv1D(nn.Module):
    """As Hugging Face's, and found under its name."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(normal(inputs, outputs, seed=3)), nn.Parameter(normal(outputs, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


@dataclasses.dataclass
class Case:
    """A layer in float64, with an input for it and the gradient of a loss with respect to its output."""

    layer: nn.Module
    a: Tensor
    seed: int = 7

    @property
    def g(self) -> Tensor:
        return normal(*self.layer(self.a).shape, seed=self.seed)


CASES: dict[str, Case] = {
    "linear [B, D]": Case(nn.Linear(5, 4), normal(3, 5)),
    "linear [B, T, D] gram": Case(nn.Linear(24, 20), normal(3, 4, 24)),
    "linear [B, T, D] instantiated": Case(nn.Linear(3, 4), normal(3, 11, 3)),
    "linear [B, H, W, D]": Case(nn.Linear(5, 4), normal(3, 2, 6, 5)),
    "linear of five dimensions": Case(nn.Linear(5, 4), normal(2, 2, 3, 2, 5)),
    "linear without bias": Case(nn.Linear(5, 4, bias=False), normal(3, 6, 5)),
    "linear of one row": Case(nn.Linear(5, 4), normal(1, 6, 5)),
    "linear 1 to 1": Case(nn.Linear(1, 1), normal(3, 6, 1)),
    "linear of a transposed input": Case(nn.Linear(5, 4), normal(3, 5, 6).mT),
    "linear of an expanded input": Case(nn.Linear(5, 4), normal(1, 1, 5).expand(3, 6, 5)),
    "embedding [B]": Case(nn.Embedding(6, 4), indices(3, below=6)),
    "embedding [B, T]": Case(nn.Embedding(6, 4), indices(3, 9, below=6)),
    "embedding [B, H, W]": Case(nn.Embedding(6, 4), indices(3, 2, 5, below=6)),
    "embedding with padding": Case(nn.Embedding(6, 4, padding_idx=2), indices(3, 9, below=6)),
    "embedding with padding from the end": Case(nn.Embedding(6, 4, padding_idx=-1), indices(3, 9, below=6)),
    "embedding of nothing but padding": Case(nn.Embedding(6, 4, padding_idx=0), torch.zeros(2, 3, dtype=torch.long)),
    "embedding of expanded ids": Case(nn.Embedding(9, 4), torch.arange(9).expand(3, 9)),
    "embedding of non-contiguous ids": Case(nn.Embedding(6, 4), indices(9, 3, below=6).T),
    "embedding of int32 ids": Case(nn.Embedding(6, 4), indices(3, 9, below=6).int()),
    "layer norm [B, D]": Case(nn.LayerNorm(5), normal(3, 5)),
    "layer norm [B, T, D]": Case(nn.LayerNorm(5), normal(3, 7, 5) * 3 + 1),
    "layer norm over two dimensions": Case(nn.LayerNorm((4, 5)), normal(3, 2, 4, 5)),
    "layer norm over all but the rows": Case(nn.LayerNorm((4, 5)), normal(3, 4, 5)),
    "layer norm without bias": Case(nn.LayerNorm(5, bias=False), normal(3, 7, 5)),
    "layer norm with a large eps": Case(nn.LayerNorm(5, eps=0.5), normal(3, 7, 5)),
    "layer norm of one row": Case(nn.LayerNorm(5), normal(1, 7, 5)),
    "rms norm [B, D]": Case(nn.RMSNorm(5), normal(3, 5)),
    "rms norm [B, T, D]": Case(nn.RMSNorm(5), normal(3, 7, 5) * 3 + 1),
    "rms norm over two dimensions": Case(nn.RMSNorm((4, 5)), normal(3, 2, 4, 5)),
    "rms norm with a large eps": Case(nn.RMSNorm(5, eps=0.5), normal(3, 7, 5)),
    "group norm [B, C]": Case(nn.GroupNorm(2, 6), normal(3, 6)),
    "group norm [B, C, H, W]": Case(nn.GroupNorm(3, 6, eps=0.1), normal(3, 6, 4, 5) * 2 + 1),
    "instance norm 1d": Case(nn.InstanceNorm1d(4, affine=True), normal(3, 4, 7)),
    "instance norm 2d": Case(nn.InstanceNorm2d(4, affine=True, eps=0.1), normal(3, 4, 3, 5)),
    "instance norm 3d": Case(nn.InstanceNorm3d(2, affine=True), normal(3, 2, 3, 2, 2)),
    "transposed linear": Case(Conv1D(5, 4), normal(3, 6, 4)),
    "transposed linear [B, D]": Case(Conv1D(5, 4), normal(3, 4)),
    "transposed linear gram": Case(Conv1D(24, 20), normal(3, 4, 20)),
    "conv 1d": Case(nn.Conv1d(3, 4, 3), normal(3, 3, 9)),
    "conv 1d same": Case(nn.Conv1d(3, 4, 4, padding="same", dilation=2, bias=False), normal(3, 3, 9)),
    "conv 2d": Case(nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), normal(3, 3, 8, 7)),
    "conv 2d patches": Case(nn.Conv2d(3, 40, 4, stride=4), normal(3, 3, 8, 8)),
    "conv 2d valid": Case(nn.Conv2d(2, 4, 3, padding="valid"), normal(3, 2, 5, 4)),
    "conv 2d same of even kernel": Case(nn.Conv2d(2, 3, (2, 4), padding="same"), normal(3, 2, 5, 4)),
    "conv 2d 1 x 1": Case(nn.Conv2d(5, 3, 1), normal(3, 5, 4, 4)),
    "conv 2d gram": Case(nn.Conv2d(8, 32, 3), normal(2, 8, 4, 5)),
    "conv 2d of groups": Case(nn.Conv2d(6, 4, 3, groups=2, padding=1, stride=2), normal(3, 6, 5, 6)),
    "conv 2d of groups, gram": Case(nn.Conv2d(16, 32, 3, groups=2), normal(3, 16, 4, 4)),
    "conv 2d depthwise": Case(nn.Conv2d(6, 12, 3, groups=6, padding=1), normal(3, 6, 5, 5)),
    "conv 2d channels last": Case(
        nn.Conv2d(3, 4, 3, padding=1), normal(3, 3, 8, 7).to(memory_format=torch.channels_last)
    ),
    "conv 2d of an expanded input": Case(nn.Conv2d(3, 4, 3), normal(1, 1, 8, 7).expand(3, 3, 8, 7)),
    "conv 2d of one row": Case(nn.Conv2d(3, 4, 3), normal(1, 3, 8, 7)),
    "transposed conv": Case(nn.ConvTranspose2d(4, 3, 2, stride=2), normal(3, 4, 3, 5)),
    "transposed conv 1d": Case(nn.ConvTranspose1d(4, 6, 3, 2, padding=1, output_padding=1, groups=2), normal(3, 4, 5)),
    "transposed conv, dilated": Case(
        nn.ConvTranspose2d(2, 3, (3, 2), 2, padding=1, output_padding=(2, 1), dilation=3, bias=False),
        normal(3, 2, 4, 3),
    ),
    "transposed conv 3d": Case(
        nn.ConvTranspose3d(2, 3, (2, 3, 1), (1, 2, 2), padding=(0, 2, 0)), normal(2, 2, 2, 3, 2)
    ),
    "conv 3d": Case(nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 1), stride=(1, 2, 1)), normal(3, 2, 3, 6, 2)),
}
for mode in ("reflect", "replicate", "circular"):
    CASES[f"conv 1d {mode}"] = Case(nn.Conv1d(3, 4, 3, padding=2, padding_mode=mode, stride=2), normal(3, 3, 9))
    CASES[f"conv 2d {mode}"] = Case(nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode=mode), normal(3, 2, 5, 6))
    CASES[f"conv 3d {mode}"] = Case(nn.Conv3d(2, 2, 2, padding="same", padding_mode=mode), normal(2, 2, 3, 4, 3))
for case in CASES.values():
    case.layer.double()


def one_row_at_a_time(layer: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """``{parameter: [B, *shape]}`` float64: each row through the layer alone."""
    rows = []
    for i in range(a.shape[0]):
        layer.zero_grad()
        (layer(a[i : i + 1]) * g[i : i + 1]).sum().backward()
        rows.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    layer.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def wanted(layer: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in layer.named_parameters())


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_rule_against_the_layer_itself(name: str, dtype: torch.dtype) -> None:
    """What the formats record is taken as it is: the oracle sees the same rounded inputs and output gradients."""
    case = CASES[name]
    layer, a, g = case.layer, case.a, case.g.to(dtype)
    if a.is_floating_point():
        a = a.to(dtype)
    expected = one_row_at_a_time(layer, a.double() if a.is_floating_point() else a, g.double())
    found = rule_for(layer)(copy.deepcopy(layer).to(dtype), a, g, wanted(layer))
    assert set(found) == set(expected)
    for parameter, gradient in found.items():
        G = expected[parameter]
        torch.testing.assert_close(gradient.dense().double(), G, rtol=TOLERANCE[dtype], atol=50 * TOLERANCE[dtype])
        norm = gradient.norm_terms().norm_sq.sqrt()
        torch.testing.assert_close(norm, G.flatten(1).norm(dim=1), rtol=TOLERANCE[dtype], atol=50 * TOLERANCE[dtype])
        summed = gradient.weighted_sum(torch.ones(len(G), dtype=torch.float64), torch.ones(len(G), dtype=torch.bool))
        torch.testing.assert_close(summed.double(), G.sum(0), rtol=TOLERANCE[dtype], atol=50 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", CASES)
def test_rule_needs_no_weights(name: str) -> None:
    """Under FSDP they are resharded when a rule runs: parameters without storage must do."""
    case = CASES[name]
    bare = copy.deepcopy(case.layer)
    for parameter in bare.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    found = rule_for(bare)(bare, case.a, case.g, wanted(bare))
    expected = rule_for(case.layer)(case.layer, case.a, case.g, wanted(bare))
    for parameter in expected:
        assert torch.equal(found[parameter].dense(), expected[parameter].dense())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(wanted(case.layer)) == 2])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_frozen_parameters_cost_nothing(name: str, parameter: str) -> None:
    case = CASES[name]
    assert set(rule_for(case.layer)(case.layer, case.a, case.g, frozenset([parameter]))) == {parameter}


def test_forms() -> None:
    """Large gradients stay in factors, small ones are stored."""
    kinds: dict[str, dict[str, type]] = {}
    for name in ("linear [B, T, D] gram", "embedding [B, T]", "layer norm [B, T, D]", "rms norm [B, T, D]"):
        case = CASES[name]
        found = rule_for(case.layer)(case.layer, case.a, case.g, wanted(case.layer))
        kinds[type(case.layer).__name__] = {parameter: type(gradient) for parameter, gradient in found.items()}
    assert kinds == {
        "Linear": {"weight": OuterProduct, "bias": Materialized},
        "Embedding": {"weight": IndexedRows},
        "LayerNorm": {"weight": Materialized, "bias": Materialized},
        "RMSNorm": {"weight": Materialized},
    }


def test_linear_keeps_the_recorded_tensors_as_they_are() -> None:
    """No copy in a wider format is held from the tap to the end of backward."""
    a, g = normal(3, 4, 24).bfloat16(), normal(3, 4, 20).bfloat16()
    layer = nn.Linear(24, 20)
    found = rule_for(layer)(layer, a, g, frozenset(["weight"]))["weight"]
    assert isinstance(found, OuterProduct)
    assert found.a_BTD.data_ptr() == a.data_ptr() and found.g_BTP.data_ptr() == g.data_ptr()


def test_half_precision_sums_over_positions_in_float32() -> None:
    """4096 times 1/256 and more, which a bfloat16 sum would stop counting. Seen to fail with `g.sum(1)`."""
    g = torch.full((2, 4096, 3), 2.0**-8, dtype=torch.bfloat16)
    a = torch.ones(2, 4096, 3, dtype=torch.bfloat16)
    for layer in (nn.Linear(3, 3), nn.LayerNorm(3)):
        bias = rule_for(layer)(layer, a, g, frozenset(["bias"]))["bias"]
        assert bias.dense().dtype == torch.float32
        assert torch.equal(bias.dense(), torch.full((2, 3), 16.0))
    table = nn.Embedding(2, 3)
    ids = torch.zeros(2, 4096, dtype=torch.long)
    dense = rule_for(table)(table, ids, g, frozenset(["weight"]))["weight"].dense()
    assert torch.equal(dense[:, 0], torch.full((2, 3), 16.0))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
def test_default_eps_is_the_one_that_the_layer_used(make: Callable[[int], nn.Module], dtype: torch.dtype) -> None:
    """With inputs so small that eps decides. torch takes RMSNorm's default from the format that it computes in, float32
    for half precision. Seen to fail with the eps of bfloat16, which makes the gradient 80 times too small.
    """
    layer = make(16).to(dtype)
    a, g = (normal(4, 3, 16) * 2.0**-10).to(dtype), normal(4, 3, 16, seed=1).to(dtype)
    (layer(a) * g).sum().backward()
    found = rule_for(layer)(layer, a, g, frozenset(["weight"]))["weight"].dense().sum(0)
    assert layer.weight.grad is not None
    tolerance = max(TOLERANCE[dtype], 4 * torch.finfo(dtype).eps)
    expected = layer.weight.grad.double()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("name", ["linear [B, T, D] gram", "layer norm [B, T, D]", "rms norm [B, T, D]"])
@pytest.mark.parametrize("where", ["a", "g"])
def test_a_non_finite_row_touches_no_other_row(name: str, where: str) -> None:
    case = CASES[name]
    a, g = case.a.clone(), case.g
    expected = rule_for(case.layer)(case.layer, a, g, wanted(case.layer))
    dirty_a, dirty_g = a.clone(), g.clone()
    (dirty_a if where == "a" else dirty_g)[1, 0, 0] = float("nan")
    found = rule_for(case.layer)(case.layer, dirty_a, dirty_g, wanted(case.layer))
    keep = torch.tensor([True, False, True])
    for parameter, gradient in found.items():
        terms, clean = gradient.norm_terms().stack(), expected[parameter].norm_terms().stack()
        assert torch.equal(terms[:, keep], clean[:, keep])
        if parameter == "weight" or where == "g":
            assert not torch.isfinite(terms[0, 1])


CONVOLUTIONS = [name for name in CASES if name.startswith("conv")]


@pytest.mark.parametrize("scratch", [1, 500])
def test_patches_cut_piece_by_piece(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of them fit. Kept rows and weights as of a real microbatch."""
    for name in CONVOLUTIONS:
        case = CASES[name]
        a, g, B = case.a, case.g, len(case.a)
        weight, keep = torch.linspace(0.5, 2, B).double(), torch.arange(B) != 1
        expected = one_row_at_a_time(case.layer, a, g)["weight"]
        found = PatchProduct(a, g, convolution.geometry(case.layer))
        monkeypatch.setattr(patches, "MAX_SCRATCH_ELEMENTS", scratch)
        torch.testing.assert_close(found.dense(), expected)
        torch.testing.assert_close(found.norm_terms().norm_sq, expected.flatten(1).square().sum(1))
        dirty = PatchProduct(torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, torch.nan), g, found.geometry)
        summed = (expected[keep] * weight[keep].view(-1, *[1] * (expected.ndim - 1))).sum(0)
        torch.testing.assert_close(dirty.weighted_sum(weight, keep), summed)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rounding_of_a_convolutions_norm_is_within_its_bound(name: str) -> None:
    """Large means in the input and slopes that cancel: the gradient is a sliver of what is added up."""
    case = CASES[name]
    a, g = case.a + 100, case.g - case.g.flatten(2).mean(2).view(*case.g.shape[:2], *[1] * (case.g.ndim - 2))
    layer = copy.deepcopy(case.layer).float()
    a, g = a.float(), g.float()
    truth = one_row_at_a_time(case.layer, a.double(), g.double())["weight"]
    found = rule_for(layer)(layer, a, g, frozenset(["weight"]))["weight"]
    terms = found.norm_terms()
    off = (terms.norm_sq - truth.flatten(1).square().sum(1)).abs()
    assert bool((off <= terms.error).all()) and bool((off > 0).any())
    for i in range(len(a)):
        one = torch.zeros(len(a)).index_fill_(0, torch.tensor([i]), 1.0)
        rounding = (found.weighted_sum(one, one.bool()).double() - truth[i]).norm()
        assert rounding <= terms.rounding_sq[i].sqrt() + terms.error[i].sqrt()


# --------------------------------------------------------------------------------------------------------- registry


def test_supported_layers_are_the_stated_ones() -> None:
    """What is in the table says what it does; so does what is refused."""
    assert Projection.documented_as in supported()
    stated = (
        "Conv1D Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Embedding EmbeddingBag GroupNorm "
        "InstanceNorm1d InstanceNorm2d InstanceNorm3d"
    )
    assert list(supported()) == [*stated.split(), "LayerNorm", "Linear", "MultiheadAttention", "RMSNorm", "RNNBase"]
    assert list(refused()) == ["BatchNorm", "RNNBase"]
    assert all(text.endswith(".") for text in supported().values())
    for case in CASES.values():
        assert has_rule(case.layer) and refusal(case.layer) is None


class Named(nn.Linear):
    """Overrides nothing that its base's forward uses."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.label = "named"

    def extra_repr(self) -> str:
        return self.label


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Rounded(nn.Linear):
    """Its weight is not what it was made to be."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return self._parameters["weight"].round()


class Flipped(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.flip(2), bias)


@pytest.mark.parametrize("layer", [Named(), nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)])
def test_a_subclass_that_changes_nothing_has_its_bases_rule(layer: nn.Module) -> None:
    assert has_rule(layer) and rule_for(layer) is rule_for(nn.Linear(2, 2))


@pytest.mark.parametrize("layer", [Squared(2, 2), Rounded(2, 2), Flipped(2, 2, 2), nn.Bilinear(2, 2, 2)])
def test_other_modules_are_run_again_row_by_row(layer: nn.Module) -> None:
    """Seen to fail for Flipped, where only `forward` is looked at."""
    assert not has_rule(layer) and refusal(layer) is None
    assert rule_for(layer) is leaf.leaf


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm1d(3), ("BatchNorm1d", "mixes the rows", "fsdp_dp.replace_batch_norm(model)")),
        (nn.SyncBatchNorm(3), ("SyncBatchNorm", "mixes the rows")),
        (nn.InstanceNorm1d(3, affine=True, track_running_stats=True), ("track_running_stats=True", "set it to False")),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), ("scale_grad_by_freq", "set it to False")),
        (nn.Embedding(3, 2, max_norm=1.0), ("max_norm", "set max_norm=None")),
        (nn.Embedding(3, 2, sparse=True), ("sparse=True", "set sparse=False")),
        (nn.EmbeddingBag(3, 2, sparse=True), ("sparse=True", "set sparse=False")),
        (nn.EmbeddingBag(3, 2, mode="max"), ("mode='max'", "use 'sum' or 'mean'")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_exact_is_refused_with_the_reason_and_a_way_out(
    layer: nn.Module, words: tuple[str, ...]
) -> None:
    reason = refusal(layer)
    assert reason is not None
    for word in words:
        assert word in reason


def test_a_parameter_that_the_rule_does_not_know_is_named() -> None:
    assert unknown_parameters(nn.Linear(2, 2), ["weight", "bias"]) is None
    reason = unknown_parameters(nn.Linear(2, 2), ["weight", "gate"])
    assert reason is not None and "gate" in reason and "weight norm" in reason


def test_a_new_layer_is_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not cover a subclass that computes something else."""
    for table in ("_ENTRIES",):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    class Doubled(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert not has_rule(Scale())

    @layer_rule(Scale, parameters=("factor",), check=lambda module: None if module.training else "only in training")
    def scale(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
        return {"factor": Materialized((a * g).sum(1))}

    assert refusal(Scale()) is None
    assert refusal(Scale().eval()) == "only in training"
    assert unknown_parameters(Scale(), ["factor"]) is None
    assert not has_rule(Doubled())
    assert "Scale" in supported()
    layer, a, g = Scale().double(), normal(3, 2, 4), normal(3, 2, 4, seed=1)
    found = rule_for(layer)(layer, a, g, frozenset(["factor"]))["factor"].dense()
    torch.testing.assert_close(found, one_row_at_a_time(layer, a, g)["factor"])
