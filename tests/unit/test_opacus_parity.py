"""The same numbers as Opacus 1.6, on one device: per-sample norms, clipped sums without noise, and its ghost clipping.

Opacus divides by ``norm + 1e-6`` where this library divides by a certified norm. In float64 and with gradients of norm
1e3 and more both come to less than 1e-8 of the result, so that the tolerance can be tight.
"""

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from fsdp_dp import PrivacyConfig, PrivacyEngine, make_private

CLASSES = 40
LOSS_SCALE = 1e4


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 11), nn.Linear(11, CLASSES, bias=False)
        self.centred, self.scaled = nn.LayerNorm(11), nn.RMSNorm(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.scaled(torch.tanh(self.centred(self.inner(x)))))


class Transformer(nn.Module):
    """One block of causal attention over token and position embeddings, and a head for every position."""

    def __init__(self, tied: bool = False, width: int = 16, longest: int = 7) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(CLASSES, width), nn.Embedding(longest, width)
        self.before, self.between, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, CLASSES, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        # Contiguous position ids: Opacus cannot take expanded ones.
        places = torch.arange(ids.shape[1]).repeat(ids.shape[0], 1)
        x = self.tokens(ids) + self.places(places)
        q, k, v = self.qkv(self.before(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.down(F.gelu(self.up(self.between(x))))
        return self.head(self.after(x))


def mlp_batch(rows: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    scale = torch.logspace(-1, 1, rows, dtype=torch.float64)[:, None]
    inputs = scale * torch.randn(rows, 6, generator=random, dtype=torch.float64)
    return inputs, torch.randint(CLASSES, (rows,), generator=random)


def sequence_batch(rows: int, dimensions: int = 7) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(CLASSES, (rows, dimensions + 1), generator=random)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "mlp": (Mlp, mlp_batch),
    "linear on sequences of vectors": (
        lambda: nn.Linear(6, CLASSES),
        lambda rows: (torch.randn(rows, 9, 6, dtype=torch.float64), torch.randint(CLASSES, (rows, 9))),
    ),
    "transformer": (Transformer, sequence_batch),
    "transformer with tied weights": (lambda: Transformer(tied=True), sequence_batch),
}


@pytest.fixture(params=MODELS)
def problem(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, batch = MODELS[request.param]
    return make().double(), *batch(6)


@pytest.fixture(autouse=True)
def opacus_warnings() -> Iterator[None]:
    """Opacus hooks modules whose inputs need no gradient, and torch remarks on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        yield


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """``[B]``: of every row the sum over its positions."""
    by_position = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return LOSS_SCALE * by_position.view(len(targets), -1).sum(1)


def loss_of(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    by_row = row_losses(logits, targets)
    return by_row.mean() if reduction == "mean" else by_row.sum()


def private_step(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, bound: float, reduction: str
) -> tuple[PrivacyEngine, dict[str, Tensor]]:
    """This library's clipped sums, un-noised."""
    rows = len(inputs)
    privacy = PrivacyConfig(
        max_grad_norm=bound,
        noise_multiplier=0.0,
        expected_batch_size=rows,
        dataset_size=1000,
        target_delta=1e-5,
        sampling="external_poisson",
        loss_reduction=reduction,
    )
    engine = make_private(model, privacy)
    loss_of(model(inputs), targets, reduction).backward()
    engine.privatize()
    return engine, {name: p.grad * rows for name, p in model.named_parameters() if p.grad is not None}


def opacus_step(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, bound: float, reduction: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Opacus's per-sample norms ``[B]`` and clipped sums, from materialized per-sample gradients."""
    wrapped = GradSampleModule(model, loss_reduction=reduction)
    loss_of(wrapped(inputs), targets, reduction).backward()
    by_parameter = [p.grad_sample.flatten(1).norm(dim=1) for p in model.parameters()]
    norms = torch.stack(by_parameter).norm(dim=0)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=len(inputs),
        loss_reduction=reduction,
    )
    optimizer.clip_and_accumulate()
    return norms, {name: p.summed_grad for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float, relative: float) -> None:
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=relative * bound)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipped", ["every row", "some rows", "no row"])
def test_norms_and_clipped_sums(problem: tuple[nn.Module, Tensor, Tensor], clipped: str, reduction: str) -> None:
    model, inputs, targets = problem
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    norms, _ = opacus_step(copy.deepcopy(model), inputs, targets, bound=1.0, reduction=reduction)
    assert norms.min() > 1e3
    factor = {"every row": 0.1 * norms.min(), "some rows": norms.median() * 1.01, "no row": 1.1 * norms.max()}
    bound = factor[clipped].item()
    norms, expected = opacus_step(theirs, inputs, targets, bound=bound, reduction=reduction)
    engine, found = private_step(ours, inputs, targets, bound=bound, reduction=reduction)
    torch.testing.assert_close(engine.per_sample_norms, norms, rtol=1e-9, atol=0)
    assert_same(found, expected, bound, 2e-8)


def test_float32(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, inputs, targets = problem
    model.float()
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    norms, _ = opacus_step(copy.deepcopy(model), inputs, targets, bound=1.0, reduction="mean")
    bound = norms.median().item()
    norms, expected = opacus_step(copy.deepcopy(model), inputs, targets, bound=bound, reduction="mean")
    engine, found = private_step(model, inputs, targets, bound=bound, reduction="mean")
    torch.testing.assert_close(engine.per_sample_norms, norms.double(), rtol=1e-5, atol=0)
    # The margins of `numerics="certified"` and float32: a little less than Opacus sums, never more.
    assert_same(found, expected, bound, 1e-3)


def opacus_ghost_step(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, bound: float, reduction: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Opacus's norms and clipped sums by ghost clipping: two backwards, norms without gradients."""
    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=bound, use_ghost_clipping=True, loss_reduction=reduction
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=len(inputs),
        loss_reduction=reduction,
    )
    DPTensorFastGradientClipping(wrapped, optimizer, row_losses(wrapped(inputs), targets), reduction).backward()
    return wrapped.per_sample_gradient_norms, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ghost_clipping(problem: tuple[nn.Module, Tensor, Tensor], reduction: str) -> None:
    """Where Opacus's runs: it refuses tied weights."""
    model, inputs, targets = problem
    bound = opacus_step(copy.deepcopy(model), inputs, targets, bound=1.0, reduction=reduction)[0].median().item()
    if isinstance(model, Transformer) and model.head.weight is model.tokens.weight:
        with pytest.raises(NotImplementedError, match="Parameter tying is not supported"):
            opacus_ghost_step(model, inputs, targets, bound=bound, reduction=reduction)
        return
    norms, expected = opacus_ghost_step(copy.deepcopy(model), inputs, targets, bound=bound, reduction=reduction)
    engine, found = private_step(model, inputs, targets, bound=bound, reduction=reduction)
    torch.testing.assert_close(engine.per_sample_norms, norms, rtol=1e-9, atol=0)
    assert_same(found, expected, bound, 2e-8)
