"""`nn.MultiheadAttention`, and through it torch's encoder and decoder layers: exact, and what torch computes."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsdp_dp.errors import UnsupportedModelError
from tests.oracle import row_gradients_of_one_forward
from tests.unit.toys import ROWS, clipped_sum, flat, moved, private, row_gradients, values

L, E = 3, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Use = Callable[[nn.Module, Tensor], Tensor]


class Around(nn.Module):
    def __init__(self, inner: nn.Module, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last, self.use = nn.Linear(E, E), inner, nn.Linear(E, 2), use
        self.double()
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self.inner, self.first(x)))


def sequence_first(use: Callable[[nn.Module, Tensor], Tensor]) -> Use:
    return lambda m, x: use(m, x.transpose(0, 1)).transpose(0, 1)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)


def padding(x: Tensor) -> Tensor:
    """The last position of some rows."""
    return (torch.arange(x.shape[1]) == L - 1) & (x.detach()[:, :1, 0] > 0)


MODELS: dict[str, tuple[Callable[[], nn.Module], Use]] = {
    "self-attention": (lambda: nn.MultiheadAttention(E, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "sequence first": (lambda: nn.MultiheadAttention(E, 2), sequence_first(lambda m, x: m(x, x, x)[0])),
    "without bias": (lambda: nn.MultiheadAttention(E, 1, bias=False, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "keys that are values": (
        lambda: nn.MultiheadAttention(E, 2, batch_first=True), lambda m, x: m(x, y := x.flip(1).tanh(), y)[0],
    ),
    "three inputs": (
        lambda: nn.MultiheadAttention(E, 2, batch_first=True), lambda m, x: m(x, x.sin(), x.tanh(), need_weights=False)[0],
    ),
    "other widths": (
        lambda: nn.MultiheadAttention(E, 2, kdim=2, vdim=3, batch_first=True),
        lambda m, x: m(x, x[..., :2], x[..., :3], need_weights=False)[0],
    ),
    "weights in the loss": (
        lambda: nn.MultiheadAttention(E, 2, batch_first=True), lambda m, x: (y := m(x, x, x))[0] + y[1].sum(2, True),
    ),
    "learned queries": (
        lambda: Pooled(), lambda m, x: m(x),
    ),
    "out_proj alone": (lambda: frozen_but(nn.MultiheadAttention(E, 2, batch_first=True), "out_proj"),
                       lambda m, x: m(x, x, x)[0]),
    "in_proj_bias alone": (lambda: frozen_but(nn.MultiheadAttention(E, 2, batch_first=True), "in_proj_bias"),
                           lambda m, x: m(x, x, x)[0]),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(E, 2, 5, dropout=0.0, batch_first=True),
        lambda m, x: m(x, src_key_padding_mask=padding(x)),
    ),
    "encoder, sequence first": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 5, dropout=0.0), 2, enable_nested_tensor=False),
        sequence_first(lambda m, x: m(x, mask=CAUSAL, is_causal=True)),
    ),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(E, 2, 5, dropout=0.0, batch_first=True, norm_first=True),
        lambda m, x: m(x, x[:, :2].sin(), tgt_mask=CAUSAL, tgt_is_causal=True),
    ),
}  # fmt: skip


def frozen_but(module: nn.Module, name: str) -> nn.Module:
    for n, p in module.named_parameters():
        p.requires_grad_(n.startswith(name))
    return module


class Pooled(nn.Module):
    """Queries that are a parameter, the same for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(normal(1, 2, E))
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.queries.expand(len(x), -1, -1), x, x, need_weights=False)[0]


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1).mean()


@pytest.mark.parametrize("name", MODELS)
def test_release_is_the_oracles(name: str) -> None:
    make, use = MODELS[name]
    for microbatch in (ROWS, L, 1):
        model = Around(make(), use)
        x = normal(ROWS, L, E, seed=3)
        if "sequence" in name and microbatch == L:
            continue
        mine = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
        everything = row_gradients(model, row_loss, x).split([p.numel() for p in model.parameters()], 1)
        expected = clipped_sum(torch.cat([everything[i] for i in mine], 1)) / ROWS
        subject = private(model, sampling="external_poisson")
        before = values(model)
        for part in x.split(microbatch):
            row_loss(model, part).backward()
        subject.optimizer.step()
        found = flat({n: v for n, v in moved(model, before).items() if model.get_parameter(n).requires_grad})
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


OPTIONS: list[dict[str, Any]] = [
    {"need_weights": a, "attn_mask": b, "key_padding_mask": c, "average_attn_weights": d}
    for a, b, c, d in itertools.product(
        (False, True), (None, "float", "bool", "3-D"), (None, "bool", "float"), (True, False)
    )
]
MASKS = {
    "float": CAUSAL,
    "bool": torch.ones(L, L, dtype=torch.bool).triu(1),
    "3-D": normal(4 * 2, L, L, seed=6),
    None: None,
}
PADDINGS = {"bool": torch.arange(L)[None] >= torch.tensor([[3], [2], [1], [3]]), None: None}
PADDINGS["float"] = torch.zeros(4, L, dtype=torch.float64).masked_fill(PADDINGS["bool"], -torch.inf)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_is_torchs(batch_first: bool, dropout: float) -> None:
    """Its random numbers included."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(E, 2, dropout=dropout, batch_first=batch_first).double()
    model = copy.deepcopy(plain)
    subject = private(model, sampling="external_poisson")
    x = normal(4, L, E, seed=3)
    for options in OPTIONS:
        kwargs = options | {
            "attn_mask": MASKS[options["attn_mask"]], "key_padding_mask": PADDINGS[options["key_padding_mask"]]
        }  # fmt: skip
        inputs = (x, x.sin(), x.tanh()) if batch_first else [v.transpose(0, 1) for v in (x, x.sin(), x.tanh())]
        if not batch_first and kwargs["key_padding_mask"] is None and L == 4:
            continue
        torch.manual_seed(1)
        expected = plain(*inputs, **kwargs)
        torch.manual_seed(1)
        subject.engine.discard()
        found = model(*inputs, **kwargs)
        torch.testing.assert_close(found[0].detach(), expected[0].detach(), msg=str(options))
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            torch.testing.assert_close(found[1].detach(), expected[1].detach(), msg=str(options))


def test_dropout_is_exact() -> None:
    """The oracle's one forward has the same masks within attention; those behind it depend on how memory is laid out."""
    torch.manual_seed(0)
    plain = Around(nn.TransformerEncoderLayer(E, 2, 5, dropout=0.0, batch_first=True), lambda m, x: m(x))
    plain.inner.self_attn.dropout = 0.4
    model, x = copy.deepcopy(plain), normal(ROWS, L, E, seed=3)
    torch.manual_seed(5)
    rows = list(row_gradients_of_one_forward(plain, (x, x), lambda y, _: y.sin().flatten(1).sum(1)))
    expected = clipped_sum(torch.stack([flat(of_row) for of_row in rows])) / ROWS
    subject, before = private(model, sampling="external_poisson"), values(model)
    torch.manual_seed(5)
    row_loss(model, x).backward()
    subject.optimizer.step()
    torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


def test_it_is_torchs_again_after_the_engine() -> None:
    model = nn.MultiheadAttention(E, 2, batch_first=True).double()
    names = list(model.state_dict())
    subject = private(model, sampling="external_poisson")
    assert list(model.state_dict()) == names and isinstance(model, nn.MultiheadAttention)
    subject.engine.detach()
    assert type(model) is nn.MultiheadAttention and "_parts" not in vars(model)
    assert list(model.state_dict()) == names


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_the_fast_path_is_not_taken_with_gradients() -> None:
    """In eval mode torch's encoder would compute past all modules where its input requires no gradient, but for hooks."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 5, batch_first=True), 2)
    model = nn.Sequential(encoder, nn.Linear(E, 2)).double().eval()
    x = normal(ROWS, L, E, seed=3)
    subject = private(model, sampling="external_poisson")
    for _ in range(2):
        expected = clipped_sum(row_gradients(plain_copy(model), row_loss, x)) / ROWS
        before = values(model)
        row_loss(model, x).backward()
        subject.optimizer.step()
        subject.optimizer.zero_grad()
        torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


def plain_copy(model: nn.Module) -> nn.Module:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 5, batch_first=True), 2)
    plain = nn.Sequential(encoder, nn.Linear(E, 2)).double().eval()
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_has_no_rule_is_refused(options: dict[str, bool]) -> None:
    with pytest.raises(UnsupportedModelError, match="set both to False"):
        private(nn.MultiheadAttention(E, 2, **options).double())


def test_an_input_without_a_batch_is_refused() -> None:
    model = nn.MultiheadAttention(E, 2).double()
    private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match="without a batch"):
        model(*[normal(L, E)] * 3)
