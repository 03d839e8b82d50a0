"""The engine on one device against the oracle: exact in float64, within the bound and close in low precision."""

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fsdp_dp import make_private
from tests.distributed.backends import (
    EXPECTED_BATCH_SIZE,
    TOLERANCE,
    Releases,
    Training,
    all_at_once,
    excesses,
    fail_if_any,
    inaccuracies,
    one_by_one,
    privacy_config,
)
from tests.oracle import (
    CASES,
    PRECISION_ROWS,
    Decoder,
    Gradients,
    clipped_sum,
    median_norm,
    norm,
    relative_error,
    row_gradients,
    row_gradients_of_one_forward,
    token_losses,
)

BOUND = 0.7  # below the norm of every probe row


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_update_is_the_oracles(case: str, loss_reduction: str) -> None:
    training = Training(case=case, backend="plain", loss_reduction=loss_reduction)
    assert training.error(training.run()) <= TOLERANCE


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
@pytest.mark.parametrize("case", ["decoder", "tied", "partly frozen", "biases only"])
def test_trajectory_is_the_oracles(case: str, optimizer: str) -> None:
    training = Training(case=case, backend="plain", optimizer=optimizer, steps=5, microbatch=3)
    assert training.error(training.run()) <= TOLERANCE


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.one_at_a_time])
def test_reported_norms_are_the_oracles(case: str) -> None:
    chosen = CASES[case]
    rows = chosen.batch()
    expected = [norm(g) for g in row_gradients(chosen.model(), rows, chosen.row_losses)]
    model = chosen.model()
    engine = make_private(model, privacy_config(max_grad_norm=1.0))
    chosen.row_losses(model(rows[0]), rows[1]).mean().backward()
    assert torch.allclose(engine.per_sample_norms, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


@functools.cache
def precision(dtype: torch.dtype) -> dict[Releases, list[Gradients]]:
    """Every row of every kind on its own, then all rows of a model together."""
    tasks = [one_by_one(rows, "plain", BOUND, dtype=dtype) for rows in PRECISION_ROWS]
    tasks += [all_at_once(rows, "plain", BOUND, dtype=dtype) for rows in CASES if rows in PRECISION_ROWS]
    return {task: task.run() for task in tasks}


def test_no_row_puts_in_more_than_the_bound_in_fp32() -> None:
    fail_if_any(excesses(precision(torch.float32)))


def test_no_row_puts_in_more_than_the_bound_in_bf16() -> None:
    """The release of a bfloat16 parameter is cast to bfloat16, after the noise; 2^-8 allows for that and no more."""
    fail_if_any(excesses(precision(torch.bfloat16), cast=2.0**-8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_close_to_the_oracle(dtype: torch.dtype) -> None:
    fail_if_any(inaccuracies(precision(dtype)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_keeps_its_masks(checkpointed: bool) -> None:
    """Each row is clipped by the gradient that it has under the masks of this very forward."""
    torch.manual_seed(0)
    model = Decoder(dropout=0.3, checkpointed=checkpointed).double()
    reference, rows, seed = copy.deepcopy(model), CASES["decoder"].batch(), 11
    torch.manual_seed(seed)
    gradients = list(row_gradients_of_one_forward(reference, rows, token_losses))
    bound = sorted(norm(g) for g in gradients)[len(gradients) // 2]
    engine = make_private(model, privacy_config(max_grad_norm=bound))
    torch.manual_seed(seed)
    token_losses(model(rows[0]), rows[1]).mean().backward()
    engine.privatize()
    assert relative_error(_released(model), clipped_sum(iter(gradients), bound)) <= TOLERANCE


def test_dropout_trains() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = Decoder(dropout=0.1).double(), CASES["decoder"].batch()
    make_private(model, privacy_config(max_grad_norm=1.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = token_losses(model(inputs), targets).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_padding_may_hold_anything() -> None:
    """Masked rows of NaN and infinity leave no trace."""
    case = CASES["inputs of rank 3"]
    inputs, targets = case.batch()
    gradients = row_gradients(case.model(), (inputs[:4], targets[:4]), case.row_losses)
    expected = clipped_sum(gradients, median_norm("inputs of rank 3"))
    inputs[4:6], inputs[6:] = float("nan"), float("inf")
    model = case.model()
    engine = make_private(model, privacy_config(max_grad_norm=median_norm("inputs of rank 3"), loss_reduction="sum"))
    with engine.microbatch(torch.arange(len(inputs)) < 4):
        case.row_losses(model(inputs), targets).sum().backward()
    engine.privatize()
    assert relative_error(_released(model), expected) <= TOLERANCE


@pytest.mark.parametrize(("dtype", "scale", "tolerance"), [(torch.float32, 3e-4, 1e-4), (torch.bfloat16, 0.1, 2e-2)])
def test_rms_norm_without_eps_takes_that_of_the_inputs_format(
    dtype: torch.dtype, scale: float, tolerance: float
) -> None:
    """Inputs so small that eps decides; the oracle's loop runs in the same format."""
    generator = torch.Generator().manual_seed(3)
    inputs = (torch.randn(5, 4, 16, generator=generator) * scale).to(dtype)
    slopes = torch.randn(5, 4, 16, generator=generator).to(dtype)

    def row_losses(outputs: torch.Tensor, of_rows: torch.Tensor) -> torch.Tensor:
        return (outputs.float() * of_rows.float()).flatten(1).sum(1)

    model = nn.Sequential(nn.RMSNorm(16)).to(dtype)
    expected = clipped_sum(row_gradients(copy.deepcopy(model), (inputs, slopes), row_losses), 1e6)
    engine = make_private(model, privacy_config(max_grad_norm=1e6))
    row_losses(model(inputs), slopes).mean().backward()
    engine.privatize()
    assert relative_error(_released(model), expected) <= tolerance


def _released(model: nn.Module) -> Gradients:
    """The clipped sums that were released without noise."""
    released = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.double() * EXPECTED_BATCH_SIZE for name, g in released.items()}
