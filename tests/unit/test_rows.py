"""Rows that a model merges, splits, permutes or picks from: exact or refused, whatever the sizes happen to be."""

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fsdp_dp.errors import UnsupportedModelError
from tests.unit.toys import ROWS, clipped_sum, flat, moved, private, row_gradients, values

T, D = 4, 3
Route = Callable[[nn.Module, Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Routing(nn.Module):
    """Experts between two Linears, and a way to them."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.route = nn.Linear(D, D), nn.Linear(D, 2), route
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.weights = nn.Parameter(torch.randn(2, D, D))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.route(self, self.first(x)))


class Shuffling(nn.Module):
    """Rows are shuffled behind all layers: at first, by chance, into the order that they have."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(D, D).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)[torch.randperm(len(x)).sort()[0]]


def row_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().flatten(1).sum(1).mean()


def experts_by_mask(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, D)
    y = torch.zeros_like(tokens)
    chosen = tokens[:, 0] > 0
    y[chosen] = m.experts[0](tokens[chosen])
    y[~chosen] = m.experts[1](tokens[~chosen])
    return y.view(x.shape)


def experts_by_index(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, D)
    y = torch.zeros_like(tokens)
    for k in range(2):
        (places,) = torch.where((tokens[:, 0] > 0) == bool(k))
        y = y.index_add(0, places, m.experts[k](tokens.index_select(0, places)))
    return y.view(x.shape)


def experts_in_order(m: nn.Module, x: Tensor) -> Tensor:
    """Sorted by a score, half to each: the same number of tokens for every expert, whatever the data."""
    tokens = x.reshape(-1, D)
    order = tokens[:, 0].argsort()
    halves = tokens[order].chunk(2)
    y = torch.cat([expert(half) for expert, half in zip(m.experts, halves, strict=True)])
    return torch.zeros_like(y).index_copy(0, order, y).view(x.shape)


def experts_by_list(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, D)
    chosen = [i for i, score in enumerate(tokens[:, 0].tolist()) if score > 0]
    y = tokens.clone()
    y[chosen] = m.experts[0](tokens[chosen])
    return y.view(x.shape)


def experts_by_list_of_numbers(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, D)
    chosen = torch.tensor([i for i, token in enumerate(tokens) if token[0] > 0])
    return tokens.index_copy(0, chosen, m.experts[0](tokens[chosen])).view(x.shape)


def experts_by_array(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, D)
    chosen = (tokens[:, 0] > 0).numpy().nonzero()[0]
    y = tokens.clone()
    y[chosen] = m.experts[0](tokens[chosen])
    return y.view(x.shape)


def bare_experts_by_mask(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, D)
    y = torch.zeros_like(tokens)
    chosen = tokens[:, 0] > 0
    y[chosen] = tokens[chosen] @ m.weights[0]
    y[~chosen] = tokens[~chosen] @ m.weights[1]
    return y.view(x.shape)


def bare_experts_by_token(m: nn.Module, x: Tensor) -> Tensor:
    """Each token with the weights of its own expert: nothing is picked from rows."""
    tokens = x.reshape(-1, D)
    return (tokens[:, None] @ m.weights[(tokens[:, 0] > 0).long()]).view(x.shape)


def without_padding(m: nn.Module, x: Tensor) -> Tensor:
    kept = x.detach().sum(-1) > -10
    packed = m.experts[0](x[kept])
    return torch.zeros_like(x).masked_scatter(kept[..., None], packed)


def shuffled_rows(m: nn.Module, x: Tensor) -> Tensor:
    order = torch.randperm(len(x))
    return m.experts[0](x[order])[order.argsort()]


def _in_order(count: int) -> np.ndarray:
    """As if it had been drawn by chance: at first, of few rows, the order often is this one."""
    np.random.rand()
    random.random()
    return np.arange(count)


def shuffled_by_numpy(m: nn.Module, x: Tensor) -> Tensor:
    return m.experts[0](x[torch.tensor(_in_order(len(x)))])


def shuffled_by_array(m: nn.Module, x: Tensor) -> Tensor:
    return m.experts[0](x[_in_order(len(x))])


def shuffled_by_shared_array(m: nn.Module, x: Tensor) -> Tensor:
    return m.experts[0](x.index_select(0, torch.from_numpy(_in_order(len(x)))))


def shuffled_by_python(m: nn.Module, x: Tensor) -> Tensor:
    return m.experts[0](x[list(_in_order(len(x)))] + x[torch.tensor(_in_order(len(x)).tolist())])


def turned_by_chance(m: nn.Module, x: Tensor) -> Tensor:
    return m.experts[0](x + x.roll(int(_in_order(1)[0]), 0))


def positions_first(m: nn.Module, x: Tensor) -> Tensor:
    return m.experts[0](x.transpose(0, 1).reshape(-1, D)).view(x.shape[1], -1, D).transpose(0, 1)


def turned_rows(m: nn.Module, x: Tensor) -> Tensor:
    return m.experts[0](x.roll(1, 0)).roll(-1, 0)


def position_by_position(m: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([m.experts[t % 2](x[:, t]) for t in range(x.shape[1])], 1)


def beams(m: nn.Module, x: Tensor) -> Tensor:
    return m.experts[0](x.repeat_interleave(3, 0)).unflatten(0, (-1, 3)).mean(1)


def last_positions(m: nn.Module, x: Tensor) -> Tensor:
    """As sequence classifiers do: an index that counts the rows, beside one that depends on the data."""
    last = (x.detach()[..., 0] > 0).sum(1).clamp(max=T - 1)
    return x + m.experts[0](x[torch.arange(len(x)), last])[:, None]


def chosen_positions(m: nn.Module, x: Tensor) -> Tensor:
    """The two best positions of every row, by gather."""
    best = x.detach()[..., 0].topk(2, dim=1)[1]
    return m.experts[0](x.gather(1, best[..., None].expand(-1, -1, D)))


EXACT: dict[str, Route] = {
    "tokens": lambda m, x: m.experts[0](x.reshape(-1, D)).view(x.shape),
    "windows": lambda m, x: m.experts[0](x.reshape(-1, 2, D)).view(x.shape),
    "position by position": position_by_position,
    "beams": beams,
    "last positions": last_positions,
    "chosen positions": chosen_positions,
    "bare experts by token": bare_experts_by_token,
}
REFUSED: dict[str, Route] = {
    "experts by mask": experts_by_mask,
    "experts by index": experts_by_index,
    "experts in order": experts_in_order,
    "experts by list": experts_by_list,
    "experts by list of numbers": experts_by_list_of_numbers,
    "experts by array": experts_by_array,
    "bare experts by mask": bare_experts_by_mask,
    "without padding": without_padding,
    "shuffled rows": shuffled_rows,
    "shuffled by NumPy": shuffled_by_numpy,
    "shuffled by an array": shuffled_by_array,
    "shuffled by a shared array": shuffled_by_shared_array,
    "shuffled by Python": shuffled_by_python,
    "turned by chance": turned_by_chance,
}
DISPROVED: dict[str, Route] = {"positions first": positions_first, "turned rows": turned_rows}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("microbatch", [ROWS, T])
def test_release_is_the_oracles(name: str, microbatch: int) -> None:
    if (name, microbatch) == ("beams", T):
        return  # as many positions as rows look like a sequence in front; that is refused
    model, x = Routing(EXACT[name]), normal(ROWS, T, D, seed=3)
    expected = clipped_sum(row_gradients(model, row_loss, x)) / ROWS
    subject, before = private(model, sampling="external_poisson"), values(model)
    for part in x.split(microbatch):
        row_loss(model, part).backward()
    subject.optimizer.step()
    torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", REFUSED)
def test_entries_picked_from_all_rows_are_refused(name: str) -> None:
    """Sizes may say what they will: here every expert may get as many tokens as there are rows.

    Seen to fail, for bare parameters, when these do not ask whether what they meet was picked.
    """
    model = Routing(REFUSED[name])
    private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match=r"'(experts\.\d|weights)' is given entries that were picked"):
        row_loss(model, normal(ROWS, T, D, seed=3))


def test_picked_outputs_are_refused() -> None:
    """No layer is given them. Seen to be released where, by chance, the rows are in their order in the first microbatch."""
    model = Shuffling()
    subject = private(model, sampling="external_poisson")
    with pytest.raises(UnsupportedModelError, match="output holds entries that were picked"):
        row_loss(model, normal(ROWS, T, D, seed=3))
    subject.engine.discard()


@pytest.mark.parametrize("name", [*REFUSED, *EXACT, *DISPROVED])
def test_one_row_a_microbatch_is_always_exact(name: str) -> None:
    model, x = Routing((REFUSED | EXACT | DISPROVED)[name]), normal(ROWS, T, D, seed=3)
    expected = clipped_sum(row_gradients(model, row_loss, x)) / ROWS
    subject, before = private(model, sampling="external_poisson"), values(model)
    for part in x.split(1):
        row_loss(model, part).backward()
    subject.optimizer.step()
    torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)
    if name in REFUSED:
        subject.optimizer.zero_grad()
        with pytest.raises(UnsupportedModelError, match="were picked"):
            row_loss(model, x)


@pytest.mark.parametrize("name", DISPROVED)
def test_rows_in_another_order_are_refused(name: str) -> None:
    model = Routing(DISPROVED[name])
    subject = private(model, sampling="external_poisson")
    row_loss(model, normal(ROWS, T, D, seed=3)).backward()
    with pytest.raises(UnsupportedModelError, match=r"gradient of 'experts"):
        subject.optimizer.step()


PAIRS = [(i, j) for j in range(ROWS) for i in range(j)]


def in_each_others_place(i: int, j: int) -> Route:
    def route(m: nn.Module, x: Tensor) -> Tensor:
        order = torch.arange(len(x))
        order[[i, j]] = order[[j, i]]
        return m.experts[0](x[order])[order]

    return route


def one_adds_to_the_other(i: int, j: int) -> Route:
    def route(m: nn.Module, x: Tensor) -> Tensor:
        y = m.experts[0](x)
        return torch.cat([y[:j], (y[j] + torch.tanh(y[i]))[None], y[j + 1 :]])

    return route


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_two_rows_in_each_others_place_are_refused(pair: tuple[int, int]) -> None:
    """Seen to fail when rows that stay have equal weights, and, of others, when one choice of rows is exchanged."""
    subject = private(Routing(in_each_others_place(*pair)), sampling="external_poisson")
    row_loss(subject.model, normal(ROWS, T, D, seed=3)).backward()
    with pytest.raises(UnsupportedModelError, match=r"gradient of 'experts"):
        subject.optimizer.step()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_row_that_adds_to_another_is_refused(pair: tuple[int, int]) -> None:
    """Its gradient then has the weight of the other's loss. Seen to fail as above."""
    subject = private(Routing(one_adds_to_the_other(*pair)), sampling="external_poisson")
    row_loss(subject.model, normal(ROWS, T, D, seed=3)).backward()
    with pytest.raises(UnsupportedModelError, match=r"gradient of '"):
        subject.optimizer.step()


@pytest.mark.parametrize("next_step", [True, False])
@pytest.mark.parametrize("bare", [False, True])
def test_an_expert_that_is_called_later_is_not_taken_at_its_sizes_word(bare: bool, next_step: bool) -> None:
    """Nothing is picked in the first microbatch; in the next as many tokens as there are rows. Seen to fail without.

    Seen to fail in the same logical batch, too, and for a bare parameter: rows were clipped that there are not.
    """

    def route(m: nn.Module, x: Tensor) -> Tensor:
        chosen = x.reshape(-1, D)[:, 0] > 5
        y = x.reshape(-1, D).clone()
        if chosen.any():
            y[chosen] = y[chosen] @ m.weights[0] if bare else m.experts[0](y[chosen])
        return y.view(x.shape)

    model, x = Routing(route), normal(ROWS, T, D, seed=3)
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(D))
    subject = private(model, sampling="external_poisson", max_grad_norm=1e-9)
    row_loss(model, x.clamp(max=2)).backward()
    if next_step:
        subject.optimizer.step()
        subject.optimizer.zero_grad()
    x.view(-1, D)[:ROWS, 0] = 9
    with pytest.raises(UnsupportedModelError, match=r"'weights'.*8 rows|'experts\.0'.*first microbatch already"):
        row_loss(model, x).backward()


def sequence_first(m: nn.Module, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    return (y @ m.weights[0] + m.experts[0](y)).transpose(0, 1)


def test_what_was_proven_is_kept_when_sizes_say_otherwise() -> None:
    """Proven with 8 rows of 4 positions, used with 4 of 4. Seen to fail, for a bare parameter, when sizes are asked again."""
    model, x = Routing(sequence_first), normal(ROWS, T, D, seed=3)
    subject = private(model, sampling="external_poisson")
    row_loss(model, x).backward()
    subject.optimizer.step()
    plain = Routing(sequence_first)
    plain.load_state_dict(values(model))
    expected, before = clipped_sum(row_gradients(plain, row_loss, x[:T])) / ROWS, values(model)
    row_loss(model, x[:T]).backward()
    subject.optimizer.step()
    torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)


def whole_and_in_windows(m: nn.Module, x: Tensor) -> Tensor:
    y = m.experts[0](x)
    return m.experts[0](y.reshape(-1, 2, D)).view(x.shape) + m.experts[0](y)


def test_a_layer_that_is_given_rows_and_their_windows() -> None:
    """In a second step as in the first. Seen to fail when one entry a row was told from a row."""
    model, x = Routing(whole_and_in_windows), normal(ROWS, T, D, seed=3)
    subject = private(model, sampling="external_poisson")
    for _ in range(2):
        plain = Routing(whole_and_in_windows)
        plain.load_state_dict(values(model))
        expected, before = clipped_sum(row_gradients(plain, row_loss, x)) / ROWS, values(model)
        row_loss(model, x).backward()
        subject.optimizer.step()
        torch.testing.assert_close(flat(moved(model, before)), expected, rtol=1e-9, atol=1e-11)
