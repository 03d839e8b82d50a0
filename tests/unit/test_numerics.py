"""Rounding: gamma is a tight bound, sums are float32 or wider, the user's flags do not reach private products.

A docstring says "Seen to fail" where the property was broken on purpose and the test was seen to find it.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.gradients import OuterProduct
from fsdp_dp.numerics import (
    SPLIT_ROUNDOFF,
    accumulate_dtype,
    exact_arithmetic,
    gamma,
    on_tensor_cores,
    product,
    split_bfloat16,
    unit_roundoff,
)

CPU = torch.device("cpu")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_are_float32_or_wider(dtype: torch.dtype) -> None:
    assert accumulate_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unit_roundoff_is_half_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    one = torch.ones((), dtype=dtype)
    next_one = one + 2 * unit_roundoff(dtype)
    assert next_one > one
    assert (one + one * unit_roundoff(dtype)) == one  # the tie goes to even
    x = torch.rand(10_000, generator=generator(), dtype=torch.float64) + 1
    assert ((x.to(dtype).double() - x).abs() <= unit_roundoff(dtype) * x).all()


# -------------------------------------------------------------------------------------------------------------- gamma


def test_gamma_is_the_formula_and_infinite_where_it_means_nothing() -> None:
    u = 2.0**-24
    assert gamma(1000, torch.float32) == pytest.approx(1000 * u / (1 - 1000 * u), rel=1e-15)
    assert gamma(1000, 2.0**-22) == pytest.approx(4000 * u / (1 - 4000 * u), rel=1e-15)
    assert gamma(0, torch.float32) == 0
    assert gamma(2**23 - 1, torch.float32) < 1
    assert gamma(2**23, torch.float32) == math.inf  # a row this long is dropped as non-finite, not trusted


@pytest.mark.parametrize("terms", [2, 100, 5000])
def test_gamma_holds_and_is_reached_by_the_worst_sum(terms: int) -> None:
    """1 + u + u + ...: every addition is a tie that goes to even, so all but the first term are lost.

    Seen to fail with gamma(n / 2).
    """
    u = unit_roundoff(torch.float32)
    total = torch.ones(())
    small = torch.tensor(u)
    for _ in range(terms - 1):
        total = total + small
    exact = 1 + (terms - 1) * u
    error, bound = exact - total.item(), gamma(terms, torch.float32) * exact
    assert 0.5 * (1 - 1 / terms) * bound < error <= bound
    assert error > 0.9 * bound or terms < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("terms", [1, 3, 64, 3000])
def test_gamma_holds_for_matrix_products(dtype: torch.dtype, terms: int) -> None:
    """Positive, mixed and cancelling products, against float64 (float32) or exact summation (float64)."""
    for seed in range(2):
        x = torch.randn(4, terms, generator=generator(seed), dtype=dtype)
        y = torch.randn(terms, 4, generator=generator(seed + 50), dtype=dtype).exp()
        for left in (x, x.abs(), x - x.mean(1, keepdim=True)):
            with exact_arithmetic(CPU):
                computed = product(left, y)
            for i in range(4):
                for j in range(4):
                    pairs = zip(left[i].tolist(), y[:, j].tolist(), strict=True)
                    products = [a * b for a, b in pairs]  # exact in float64 for float32 factors
                    off = abs(computed[i, j].item() - math.fsum(products))
                    # For float64 the products of the reference round as well: one more term.
                    assert off <= gamma(terms + 1, dtype) * math.fsum(map(abs, products))


# ----------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("left", FLOATS)
@pytest.mark.parametrize("right", FLOATS)
def test_product_accumulates_in_float32_or_wider(left: torch.dtype, right: torch.dtype) -> None:
    """Seen to fail with `x @ y` in the factors' own dtype."""
    x = torch.randn(3, 5, 400, generator=generator(1), dtype=torch.float64).to(left)
    y = torch.randn(3, 400, 2, generator=generator(2), dtype=torch.float64).to(right)
    computed, exact = product(x, y), x.double() @ y.double()
    assert computed.dtype == accumulate_dtype(torch.promote_types(left, right))
    bound = gamma(400, computed.dtype) * (x.double().abs() @ y.double().abs())
    assert ((computed.double() - exact).abs() <= bound + 1e-12).all()


def test_no_tensor_cores_on_a_cpu() -> None:
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    assert not on_tensor_cores(x, x)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_two_bfloat16_numbers_hold_a_float32_number(scale: float) -> None:
    x = torch.randn(100_000, generator=generator()) * scale
    high, low = split_bfloat16(x)
    assert high.dtype == low.dtype == torch.bfloat16
    assert ((high.double() + low.double() - x.double()).abs() <= SPLIT_ROUNDOFF * x.double().abs()).all()
    assert ((high.double() - x.double()).abs() > 2.0**-9 * x.double().abs()).any()  # one number would not do


# ------------------------------------------------------------------------------------------------- the program's flags


@pytest.fixture
def flags() -> Iterator[None]:
    """Whatever a test sets is undone: nothing set anywhere, as when torch is imported."""
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"
    torch.backends.fp32_precision = "none"


def legacy(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def set_mkldnn(precision: str) -> Callable[[], None]:
    return lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", precision)


def set_cuda(precision: str) -> Callable[[], None]:
    return lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", precision)


def set_generic(precision: str) -> Callable[[], None]:
    return lambda: setattr(torch.backends, "fp32_precision", precision)


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


USER_FLAGS = {
    "matmul_precision high": legacy("high"),
    "matmul_precision medium": legacy("medium"),
    "allow_tf32": allow_tf32,
    "mkldnn bf16": set_mkldnn("bf16"),
    "mkldnn tf32": set_mkldnn("tf32"),
    "cuda tf32": set_cuda("tf32"),
    "generic tf32": set_generic("tf32"),
}


def read_flags() -> list[str]:
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


def private_products() -> list[Tensor]:
    """Norms on both paths, the weighted sum and the dense gradient of a layer, under `exact_arithmetic`."""
    made = []
    with exact_arithmetic(CPU):
        for T in (24, 300):
            a = torch.randn(2, T, 200, generator=generator(3))
            g = torch.randn(2, T, 150, generator=generator(4))
            gradient = OuterProduct(a, g)
            weighted = gradient.weighted_sum(torch.tensor([0.3, 0.7]), torch.ones(2, dtype=torch.bool))
            made += [gradient.norm_terms().stack(), weighted, gradient.dense()]
    return made


@pytest.mark.parametrize("name", USER_FLAGS)
def test_flags_of_the_program_do_not_change_results(name: str, flags: None) -> None:
    """Seen to fail without setting `backend.fp32_precision`."""
    expected = private_products()
    USER_FLAGS[name]()
    before = read_flags()
    assert before != ["ieee", "ieee"]
    for found, wanted in zip(private_products(), expected, strict=True):
        assert torch.equal(found, wanted)
    with exact_arithmetic(CPU):
        assert read_flags() == ["ieee", "ieee"]
        with exact_arithmetic(CPU):
            pass
        assert read_flags() == ["ieee", "ieee"]
    assert read_flags() == before


def test_old_and_new_flags_can_still_be_read_afterwards(flags: None) -> None:
    """torch refuses to read its old flags when old and new disagree; what we leave behind must agree."""
    torch.set_float32_matmul_precision("high")
    with exact_arithmetic(CPU):
        pass
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.allow_tf32


def test_flags_still_follow_the_users_generic_flag_afterwards(flags: None) -> None:
    """A flag that was inherited is inherited again, not fixed at the value that it happened to have."""
    torch.backends.fp32_precision = "tf32"
    inherited = read_flags()
    with exact_arithmetic(CPU):
        pass
    assert read_flags() == inherited
    torch.backends.fp32_precision = "ieee"
    assert read_flags() == ["ieee", "ieee"]


def test_flags_and_modes_come_back_after_an_exception(flags: None) -> None:
    torch.set_float32_matmul_precision("medium")
    before = read_flags()
    with pytest.raises(ZeroDivisionError), torch.autocast("cpu", torch.bfloat16), exact_arithmetic(CPU):
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        raise ZeroDivisionError
    assert read_flags() == before
    assert torch.is_grad_enabled()


def test_autocast_does_not_change_results() -> None:
    """Seen to fail without `torch.autocast(enabled=False)`."""
    expected = private_products()
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        found = private_products()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_autocast_and_flags_active_during_backward(flags: None) -> None:
    """A program that keeps autocast on around `backward` gets the same bits as one that leaves it before.

    Seen to fail when `exact_arithmetic` in the engine's backward is replaced by `torch.no_grad`.
    """
    x = torch.randn(4, 6, 5, generator=generator(5))

    def gradients(whole_step_in_autocast: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
        privacy = PrivacyConfig(
            max_grad_norm=0.1, noise_multiplier=0.0, expected_batch_size=4, dataset_size=100, target_delta=1e-4
        )
        engine = make_private(model, privacy)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
            if whole_step_in_autocast:
                loss.backward()
        if not whole_step_in_autocast:
            loss.backward()
        engine.privatize()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(False)
    torch.set_float32_matmul_precision("medium")
    found = gradients(True)
    assert len(found) == 6
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
