"""Opacus 1.6 under FSDP2: where it fails, this library is exact. One test for each hole; the docstring says which.

`scripts/make_support_matrix.py` reads the docstrings: "Opacus NUMBER, exact or refused: the hole."
"""

import itertools
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.agreement import assert_exact, loss_of
from tests.peer_holes import sharded
from tests.peer_holes.toys import EXACT, ROWS, assert_norms, attached, ids, noise, padding_released, subject


def test_opacus_01_linears_on_inputs_of_four_dimensions() -> None:
    """Opacus 1, exact: every Linear's input has four dimensions; norms stayed zero, and nothing was clipped."""
    four = subject(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), input=noise(ROWS, 2, 3, 5))
    assert_exact(four)
    model, engine = attached(four.model())
    loss_of(four, model, four.batch()).backward()
    assert_norms(engine.per_sample_norms, four, four.model())


def test_opacus_02_tied_weights_in_one_unit() -> None:
    """Opacus 2, exact: tied weights under a root-only `fully_shard`; norms were too small."""
    assert sharded.training_error("tied, fsdp2") <= EXACT
    assert sharded.training_error("tied, fsdp1") <= EXACT


def test_opacus_03_sums_are_not_averaged_over_ranks() -> None:
    """Opacus 3, exact: `loss_reduction="sum"`; FSDP averaged all the same, W times too noisy."""
    assert sharded.training_error("sum, fsdp1") <= EXACT
    assert sharded.training_error("sum, fsdp2") <= EXACT
    for reduction in ("noise", "noise, sum"):
        assert abs(sharded.results()[reduction]["std"] / (sharded.SIGMA * sharded.BOUND) - 1) < 0.05


def test_opacus_04_empty_local_batches_are_not_dropped() -> None:
    """Opacus 4, exact: ranks whose share of a draw is empty; they had fewer batches than the others."""
    rows, microbatches = sharded.results()["rare rows"]["rows"], sharded.results()["rare rows"]["microbatches"]
    assert any(not of_step for of_rank in rows for of_step in of_rank), "no rank was ever empty"
    assert len(microbatches[0]) == len(microbatches[1]) == 12
    assert all(count >= 1 for of_rank in microbatches for count in of_rank)


def test_opacus_05_ranks_run_equally_many_microbatches() -> None:
    """Opacus 5, exact: accumulation over Poisson draws; ranks with other numbers of microbatches deadlocked."""
    microbatches = sharded.results()["same seed"]["microbatches"]
    assert microbatches[0] == microbatches[1]
    assert len(set(microbatches[0])) > 1, "every draw took the same number"


def test_opacus_06_ranks_with_one_seed_draw_independently() -> None:
    """Opacus 6, exact: one seed on all ranks; each drew the same mask of its own rows."""
    drawn = sharded.results()["same seed"]["rows"]
    steps = [set(first) | set(second) for first, second in zip(*drawn, strict=True)]
    assert all(not set(first) & set(second) for first, second in zip(*drawn, strict=True))
    half = sharded.ROWS // 2
    together = [(row in step) == (row + half in step) for step in steps for row in range(half)]
    assert 0.5 < sum(together) / len(together) < 0.75  # independent at rate 1/4: 10/16; identical masks: 1


def test_opacus_07_empty_rank_with_layer_norm() -> None:
    """Opacus 7, exact: a rank without rows, and LayerNorm; it crashed."""
    assert sharded.training_error("empty rank") <= EXACT


class Optional(nn.Module):
    """A branch that the program switches."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.use = nn.Linear(3, 3), nn.Linear(3, 3), True

    def forward(self, input: Tensor) -> Tensor:
        x = torch.tanh(self.always(input))
        return x + self.sometimes(x) if self.use else x


def test_opacus_08_layer_that_a_step_does_not_use() -> None:
    """Opacus 8, exact: a layer that one step uses and the next does not; its old norm was counted again."""
    optional = subject(Optional, input=noise(ROWS, 3))
    model, engine = attached(optional.model())
    loss_of(optional, model, optional.batch()).backward()
    engine.privatize()
    engine.discard()
    model.use = False
    loss_of(optional, model, optional.batch()).backward()
    without = optional.model()
    without.use = False  # type: ignore[assignment]
    assert_norms(engine.per_sample_norms, optional, without)
    engine.privatize()
    assert not model.sometimes.weight.grad.any()


def test_opacus_09_parameter_on_the_root() -> None:
    """Opacus 9, exact: an `nn.Parameter` on the root module; an assertion failed in deepcopy."""
    assert sharded.training_error("root parameter") <= EXACT


class Positions(nn.Module):
    """Position ids of stride 0, token ids that are a transposed view."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(11, 3), nn.Embedding(9, 3), nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        expanded = torch.arange(ids.shape[1]).expand(ids.shape)
        return self.head(self.token(ids.t().contiguous().t()) + self.position(expanded))


def test_opacus_10_expanded_and_transposed_ids() -> None:
    """Opacus 10, exact: position ids of stride 0 and token ids that are not contiguous; `.view` crashed."""
    assert_exact(subject(Positions, ids=ids()))


def test_opacus_11_hybrid_replicas() -> None:
    """Opacus 11, exact: hybrid sharding; replicas drew noise of their own and drifted apart."""
    assert sharded.results()["hybrid"] == 0


def test_opacus_12_activation_checkpointing() -> None:
    """Opacus 12, exact: activation checkpointing; it was refused as if parameters were tied."""
    assert sharded.training_error("checkpointed") <= EXACT


def test_opacus_13_noise_of_the_local_shard_in_float64() -> None:
    """Opacus 13, exact: noise was drawn for the whole model on every rank, and in bfloat16."""
    found = sharded.results()["noise"]
    assert sum(found["drawn"]) == found["elements"]
    assert max(found["drawn"]) < 0.6 * found["elements"]
    x, releases = noise(2, 3), []
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "seed fixed")
            model, engine = attached(nn.Linear(3, 40).to(dtype), noise_multiplier=1.0, seed=1)
        releases.append(padding_released(model, engine, x.to(dtype))["weight"])
    wide, narrow = releases
    assert torch.equal(narrow.bfloat16(), wide.bfloat16())


def test_opacus_14_secure_noise_needs_no_other_package() -> None:
    """Opacus 14, exact: cryptographic noise needed torchcsprng, which no longer installs."""
    releases = []
    for _ in range(2):
        torch.manual_seed(0)
        model, engine = attached(nn.Linear(3, 4), noise_multiplier=1.0)
        releases.append(padding_released(model, engine, noise(2, 3).float())["weight"])
    assert "torchcsprng" not in sys.modules
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(releases, 2))


def test_opacus_15_checkpoint_of_two_ranks_resumes_on_one() -> None:
    """Opacus 15, exact: every rank wrote its shards to one path, and a resumed run repeated its noise."""
    files, parameters = sharded.results()["saved"]
    model, engine = attached(sharded.WIDE.model(torch.float32), noise_multiplier=1.0, max_grad_norm=sharded.BOUND)
    state: dict[str, Any] = {"model": model.state_dict(), "privacy": engine.state_dict()}
    sharded.load(files, state)
    engine.load_state_dict(state["privacy"])
    assert engine.steps == 1
    assert all(torch.equal(p, parameters[name]) for name, p in sharded.names(model).items())


class LossInside(nn.Module):
    """The model computes the loss, as Hugging Face's do: a sum over tokens, divided by a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, 3), nn.Linear(3, 11)

    def forward(self, ids: Tensor, labels: Tensor, num_items_in_batch: int) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.token(ids)))
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / num_items_in_batch
        return {"loss": loss, "logits": logits}


def test_opacus_16_loss_computed_by_the_model() -> None:
    """Opacus 16, exact: the loss comes from the model (`model(**batch).loss`); it could not be used."""
    labels = torch.where(torch.arange(4) < torch.tensor([4, 2, 3, 1, 4])[:, None], ids(), -100)
    inside = subject(LossInside, lambda outputs, batch: outputs["loss"], ids=ids(), labels=labels, num_items_in_batch=7)
    assert_exact(replace(inside, loss_reduction="sum"))
