"""RMSNorm of Hugging Face's models: known by what its forward says, and by nothing else."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsdp_dp import UnsupportedModelError
from fsdp_dp.layers import has_rule, keeps, per_sample_gradients
from fsdp_dp.layers.fingerprints import fingerprint
from fsdp_dp.records import NO_CALL, Record
from tests.oracle import relative_error

gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
from transformers.models.helium.modeling_helium import HeliumRMSNorm  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402
from transformers.models.mistral.modeling_mistral import MistralRMSNorm  # noqa: E402
from transformers.models.moshi.modeling_moshi import MoshiRMSNorm  # noqa: E402
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm  # noqa: E402
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm  # noqa: E402
from transformers.models.t5.modeling_t5 import T5LayerNorm  # noqa: E402

WIDTH = 24
NORMS = (
    LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm, gemma.GemmaRMSNorm, HeliumRMSNorm, MoshiRMSNorm, Olmo2RMSNorm, T5LayerNorm,
)  # fmt: skip


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_autograd(module: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """Row by row, by the module's own forward."""
    rows = []
    for a_i, g_i in zip(a.split(1), g.split(1), strict=True):
        (grad,) = torch.autograd.grad(module(a_i), [module.weight], g_i)  # type: ignore[list-item]
        rows.append(grad)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("shape", [(3, 5, WIDTH), (2, WIDTH), (2, 3, 4, WIDTH)])
def test_each_row_has_its_gradient(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    """Also in float64, where these modules normalize in float32, and some add up in it; in bfloat16 up to its rounding.

    Seen to fail when T5's input is rounded to float32 like the others'.
    """
    module = kind(WIDTH, eps=1e-3)
    nn.init.normal_(module.weight)  # type: ignore[arg-type]
    assert has_rule(module) and keeps(module) == "first"
    double = 1e-6 if kind in (gemma.GemmaRMSNorm, HeliumRMSNorm, MoshiRMSNorm) else 1e-12
    for dtype, tolerance in ((torch.float64, double), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        own = copy.deepcopy(module).to(dtype)
        a, g = normal(*shape, seed=1, dtype=dtype) * 3 + 1, normal(*shape, seed=2, dtype=dtype)
        if dtype == torch.float64:
            a = a + 1e-12 * normal(*shape, seed=3, dtype=dtype)
        found = per_sample_gradients(own, Record(NO_CALL, (a,), (g,), shape[0]), frozenset({"weight"}))
        assert relative_error({"weight": found["weight"].dense()}, {"weight": by_autograd(own, a, g)}) < tolerance


class OneAHead(LlamaRMSNorm):
    def __init__(self, *shape: int) -> None:
        super().__init__(shape[-1], eps=1e-3)
        self.weight = nn.Parameter(normal(*shape, seed=4))


@pytest.mark.parametrize("shape", [(4, WIDTH), (1, WIDTH), (4, 1), (3, 4, 1), (1, 1, 1, WIDTH), (1,)])
def test_a_scale_of_another_shape(shape: tuple[int, ...]) -> None:
    """Seen to fail: it was taken for a vector of the width, and FSDP2 released what was in memory for the rest."""
    module = OneAHead(*shape).double()
    a, g = normal(2, 3, 4, WIDTH, seed=1, dtype=torch.float64), normal(2, 3, 4, WIDTH, seed=2, dtype=torch.float64)
    found = per_sample_gradients(module, Record(NO_CALL, (a,), (g,), 2), frozenset({"weight"}))
    assert found["weight"].dense().shape == (2, *shape)
    assert relative_error({"weight": found["weight"].dense()}, {"weight": by_autograd(module, a, g)}) < 1e-6


def test_a_scale_of_its_own_for_every_row_is_refused() -> None:
    module = OneAHead(2, WIDTH)
    a, g = normal(2, WIDTH, seed=1), normal(2, WIDTH, seed=2)
    with pytest.raises(UnsupportedModelError, match="the same for all rows"):
        per_sample_gradients(module, Record(NO_CALL, (a,), (g,), 2), frozenset({"weight"}))


class Changed(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(0, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class OtherNorm(gemma.GemmaRMSNorm):  # type: ignore[misc]
    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + self.eps)


def doubled(forward: Any) -> Any:
    @functools.wraps(forward)
    def twice(self: nn.Module, hidden_states: Tensor) -> Tensor:
        return 2 * forward(self, hidden_states)

    return twice


class Wrapped(LlamaRMSNorm):
    forward = doubled(LlamaRMSNorm.forward)


@pytest.mark.parametrize("kind", [Changed, OtherNorm, Wrapped], ids=lambda kind: kind.__name__)
def test_another_forward_is_another_layer(kind: type[nn.Module]) -> None:
    """Seen to fail when the rule is found by the class, when ``_norm`` is not read, and when a wrapper is seen through."""
    assert not has_rule(kind(WIDTH))


def test_a_norm_of_the_instance_is_another_layer() -> None:
    """Seen to fail: the rule was the class's, the gradient that of something else."""
    module = gemma.GemmaRMSNorm(WIDTH)
    assert has_rule(module)
    module._norm = lambda x: 2 * x
    assert not has_rule(module)


def test_a_forward_that_is_replaced_later_is_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels from the Hub replace it. Seen to fail when what a class says is remembered by the class."""
    module = LlamaRMSNorm(WIDTH)
    assert has_rule(module)
    monkeypatch.setattr(LlamaRMSNorm, "forward", Changed.forward)
    assert not has_rule(module)


def test_documentation_and_annotations_do_not_count() -> None:
    class Documented(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """What it does."""
            return x  # and why

    class Bare(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return x

    assert fingerprint(Documented) == fingerprint(Bare) is not None
