"""`nn.LSTM`, `nn.GRU` and `nn.RNN`: the forward is torch's to rounding, and a release is that of a loop over rows.

The oracle runs torch's own modules, each row alone.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fsdp_dp import UnsupportedModelError
from fsdp_dp.recurrence import is_recurrent
from tests.unit.toys import ROWS, clipped_sum, flat, moved, private, row_gradients, values

T, D, H = 5, 3, 4
Make = Callable[[], nn.Module]

MODULES: dict[str, Make] = {
    "LSTM": lambda: nn.LSTM(D, H, batch_first=True),
    "GRU": lambda: nn.GRU(D, H, batch_first=True),
    "RNN": lambda: nn.RNN(D, H, batch_first=True),
    "relu": lambda: nn.RNN(D, H, nonlinearity="relu", batch_first=True),
    "sequence first": lambda: nn.LSTM(D, H),
    "GRU, sequence first": lambda: nn.GRU(D, H, 2),
    "layers": lambda: nn.LSTM(D, H, 3, batch_first=True),
    "both directions": lambda: nn.GRU(D, H, 2, batch_first=True, bidirectional=True),
    "LSTM, both directions": lambda: nn.LSTM(D, H, 2, bidirectional=True),
    "projected": lambda: nn.LSTM(D, H, 2, batch_first=True, bidirectional=True, proj_size=2),
    "without biases": lambda: nn.LSTM(D, H, bias=False, batch_first=True),
    "dropout": lambda: nn.GRU(D, H, 2, batch_first=True, dropout=0.5),
}


class Sequence(nn.Module):
    """``x`` ``[B, T, D]`` with a recurrent module between layers; the loss sees its outputs and its last states."""

    def __init__(self, make: Make, use: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use, self.rnn, self.first = use, make(), nn.Linear(D, D)
        width = sum(w.shape[0] for n, w in self.rnn.named_parameters() if "hr_l0" in n)
        self.width = width or H * (2 if self.rnn.bidirectional else 1)
        self.last = nn.Linear(self.width, D)
        self.start = nn.Parameter(torch.randn(1, 1, H))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.use is not None:
            return self.use(self, h)
        y, state = self.rnn(h if self.rnn.batch_first else h.transpose(0, 1))
        states = torch.cat(
            [s.transpose(0, 1).flatten(1) for s in (state if isinstance(state, tuple) else (state,))], -1
        )
        y = y if self.rnn.batch_first else y.transpose(0, 1)
        return self.last(y).flatten(1).sin().sum(1, keepdim=True) + states.cos().sum(1, keepdim=True)


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1).mean()


def rows() -> Tensor:
    return torch.randn(ROWS, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def check_exact(model: nn.Module, microbatch: int = 4) -> None:
    expected = clipped_sum(row_gradients(copy.deepcopy(model), row_loss, rows())) / ROWS
    subject, before = private(model, sampling="external_poisson"), values(model)
    for part in rows().split(microbatch):
        row_loss(model, part).backward()
    subject.step()
    torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("microbatch", [4, 1, T], ids=["microbatch 4", "microbatch 1", "as many rows as steps"])
@pytest.mark.parametrize("name", [n for n in MODULES if n != "dropout"])
def test_release_is_the_oracles(name: str, microbatch: int) -> None:
    """Seen to fail when the state's bias is left out, and when the reverse direction's outputs are not turned back."""
    model = Sequence(MODULES[name])
    check_exact(model, microbatch)


@pytest.mark.parametrize("name", MODULES)
def test_forward_is_torchs(name: str) -> None:
    """With gradients and without; dropout where it is off."""
    plain = Sequence(MODULES[name]).eval()
    model = copy.deepcopy(plain)
    engine = private(model, sampling="external_poisson").engine
    with torch.no_grad():
        torch.testing.assert_close(model(rows()), plain(rows()), rtol=0, atol=0)
    torch.testing.assert_close(model(rows()), plain(rows()), rtol=1e-12, atol=1e-12)
    engine.discard()
    engine.detach()
    assert is_recurrent(model.rnn)
    assert type(model.rnn) is type(plain.rnn) and "_parts" not in vars(model.rnn)


def test_dropout_between_layers() -> None:
    """Half of the entries of all layers but the last, scaled: as many zeros as a binomial has, in training only."""
    wide = functools.partial(nn.RNN, D, 2000, 2, dropout=0.5, batch_first=True, nonlinearity="relu")
    model = Sequence(wide, lambda m, h: m.rnn(h)[0])
    seen = []
    subject = private(model, sampling="external_poisson")
    parts: Any = model.rnn._parts
    parts["weight_ih_l1"].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for training in (True, False):
        model.train(training)
        model(rows())
        subject.engine.discard()
    dropped, whole = ((x == 0).double().mean() for x in seen)
    assert abs(float(dropped) - (1 + float(whole)) / 2) < 0.02
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0][kept], 2 * seen[1][kept])


def _packed(sort: bool = False) -> Callable[..., Tensor]:
    def use(m: Any, h: Tensor) -> Tensor:
        lengths = 1 + (h.detach()[:, 0].abs().sum(1) * 1000).long() % T
        packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=sort)
        y, state = m.rnn(packed)
        assert isinstance(y, PackedSequence)
        padded, again = pad_packed_sequence(y, batch_first=True, total_length=T)
        assert torch.equal(lengths, again)
        states = state[0] if isinstance(state, tuple) else state
        return m.last(padded) + states[-1].sum(-1)[:, None, None]

    return use


@pytest.mark.parametrize("name", ["LSTM", "GRU", "both directions", "LSTM, both directions", "projected"])
def test_packed_sequences(name: str) -> None:
    """Rows of different lengths, in any order. Seen to fail when steps that a row has not move its state."""
    check_exact(Sequence(MODULES[name], _packed()))


def _sorted_by_hand(m: Any, h: Tensor) -> Tensor:
    lengths = 1 + (h.detach()[:, 0].abs().sum(1) * 1000).long() % T
    lengths, order = lengths.sort(descending=True)
    y, _ = m.rnn(pack_padded_sequence(h[order], lengths, batch_first=True))
    return m.last(pad_packed_sequence(y, batch_first=True, total_length=T)[0])


def _order_not_undone(m: Any, h: Tensor) -> Tensor:
    lengths = 1 + (h.detach()[:, 0].abs().sum(1) * 1000).long() % T
    packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
    y, _ = m.rnn(PackedSequence(packed.data, packed.batch_sizes))
    return m.last(pad_packed_sequence(y, batch_first=True, total_length=T)[0])


def _layer_on_packed_data(m: Any, h: Tensor) -> Tensor:
    packed = pack_padded_sequence(h, torch.full((len(h),), T), batch_first=True, enforce_sorted=False)
    return m.last(m.rnn(packed)[0].data).unflatten(0, (T, -1)).transpose(0, 1)


@pytest.mark.parametrize("use", [_sorted_by_hand, _order_not_undone, _layer_on_packed_data])
def test_packed_sequences_in_another_order_are_refused(use: Callable[..., Tensor]) -> None:
    """Their rows may be in place once, and not the next time."""
    model = Sequence(MODULES["LSTM"], use)
    subject = private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match="picked from all rows by the data"):
        row_loss(model, rows()).backward()
    subject.engine.discard()


def _from_encoder(m: Any, h: Tensor) -> Tensor:
    """A state of the rows, and the module called twice."""
    _, state = m.rnn(h)
    return m.last(m.rnn(h.flip(1), state)[0])


def _learned_start(m: Any, h: Tensor) -> Tensor:
    return m.last(m.rnn(h, m.start.expand(1, len(h), H).contiguous())[0])


def _detached_steps(m: Any, h: Tensor) -> Tensor:
    """Truncated: the state goes on without its graph."""
    first, state = m.rnn(h[:, :2])
    return m.last(torch.cat([first, m.rnn(h[:, 2:], state.detach())[0]], 1))


def _weight_penalty_free_read(m: Any, h: Tensor) -> Tensor:
    return m.last(m.rnn(h)[0]) + float(m.rnn.weight_hh_l0.shape[0])


@pytest.mark.parametrize("use", [_from_encoder, _learned_start, _detached_steps, _weight_penalty_free_read])
def test_other_uses_are_exact(use: Callable[..., Tensor]) -> None:
    check_exact(Sequence(MODULES["GRU"], use))


def test_a_list_of_states() -> None:
    """As torch takes it, too. Seen to be refused for another reason."""

    def use(m: Any, h: Tensor) -> Tensor:
        return m.last(m.rnn(h, [s.expand(1, len(h), H).contiguous() for s in (m.start, m.start.cos())])[0])

    check_exact(Sequence(MODULES["LSTM"], use))


def test_partly_frozen() -> None:
    model = Sequence(MODULES["LSTM, both directions"])
    for name, p in model.named_parameters():
        p.requires_grad_("weight_ih" not in name and "bias_hh_l1" not in name)
    plain = copy.deepcopy(model)
    gradients = []
    for row in rows():
        found = torch.autograd.grad(
            row_loss(plain, row[None]), [p for p in plain.parameters() if p.requires_grad], allow_unused=True
        )
        zeros = (p for p in plain.parameters() if p.requires_grad)
        gradients.append(
            torch.cat([(p * 0 if g is None else g).flatten() for g, p in zip(found, zeros, strict=True)]).detach()
        )
    subject, before = private(model, sampling="external_poisson"), values(model)
    row_loss(model, rows()).backward()
    subject.step()
    trained = {n: x for n, x in moved(model, before).items() if model.get_parameter(n).requires_grad}
    torch.testing.assert_close(flat(trained), clipped_sum(torch.stack(gradients)) / ROWS, rtol=1e-9, atol=1e-11)


class Own(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(input * 2, hx)


REFUSED: dict[str, tuple[Make, str]] = {
    "a forward of its own": (lambda: Own(D, H, batch_first=True), "a forward of its own"),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.GRU(D, H, batch_first=True), "weight_hh_l0"),
        "other parameters than torch gives it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    make, told = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=told):
        private(Sequence(make))


def test_without_a_batch_is_refused() -> None:
    model = Sequence(MODULES["LSTM"], lambda m, h: m.last(m.rnn(h[0])[0]))
    private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match="without a batch"):
        model(rows())
