"""`check_private` and its command: the verdict says what holds, and what is refused and why, and leaves the model alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import fsdp_dp.layers.linear
from fsdp_dp import PrivacyConfig, check, check_private, make_private
from fsdp_dp.gradients import OuterProduct
from fsdp_dp.verdict import Finding, Verdict
from tests.oracle import CASES, Decoder, token_losses

ROWS, WIDTH = 6, 5


class Small(nn.Module):
    """`kind`: what is done to its rows."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.up, self.norm, self.down = kind, nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.bn, self.never = nn.BatchNorm1d(8) if kind == "batch norm" else nn.Identity(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.norm(self.up(x)))
        if self.kind == "statistics":
            h = h - h.mean(0)
        if self.kind == "dropout":
            h = F.dropout(h, 0.5, self.training)
        return self.down(h + torch.rand_like(h) if self.kind == "random" else h)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(ROWS, WIDTH, generator=generator), "y": torch.randint(3, (ROWS,), generator=generator)}


def mean_loss(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(rows["x"]), rows["y"])


def verdict(kind: str = "", loss: Any = mean_loss, **options: Any) -> Verdict:
    return check_private(Small(kind), batch(), loss, **options)


def statuses(of: Verdict) -> dict[str, str]:
    return {finding.question: finding.status for finding in of.findings}


def text_of(of: Verdict, question: str) -> str:
    return next(finding.text for finding in of.findings if finding.question == question)


ALL_OK = dict.fromkeys(["coverage", "loss", "rows", "norms", "clipped sum"], "ok")


@pytest.mark.parametrize("case", ["decoder", "tied checkpointed", "bare parameters", "partly frozen"])
def test_models_that_can_be_trained_privately(case: str) -> None:
    chosen = CASES[case]
    found = check_private(chosen.model(), chosen.batch(), lambda m, b: token_losses(m(b[0]), b[1]).mean())
    assert found.ok and statuses(found) == ALL_OK, str(found)


def test_it_reads_well_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model, rows = Decoder(dropout=0.2), CASES["decoder"].batch(torch.float32)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = str(check_private(model, rows, lambda m, b: token_losses(m(b[0]), b[1]).mean()))
    assert found.startswith(
        "check_private: this can be trained privately\n  coverage     ok         each of 33 trainable"
    )
    assert "Linear(7, 37), weight, bias: " in found
    assert "in evaluation mode: off by" in found
    assert all(module.training for module in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_layer_that_the_loss_does_not_reach_is_named() -> None:
    assert "not reached from this loss: never.bias, never.weight" in text_of(verdict(), "coverage")


def test_what_is_not_covered_is_refused() -> None:
    found = verdict("batch norm")
    assert not found.ok and "'bn'" in text_of(found, "coverage") and "GroupNorm" in str(found)


def test_a_loss_that_couples_rows_is_refused() -> None:
    def loss(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(rows["x"]), rows["y"], weight=torch.tensor([1.0, 2.0, 5.0]))

    found = verdict(loss=loss)
    assert statuses(found) == {"loss": "REFUSED"} and "couples the rows" in str(found)


def test_a_model_that_couples_rows_is_refused() -> None:
    found = verdict("statistics")
    assert statuses(found)["rows"] == "REFUSED" and "norms" not in statuses(found)


@pytest.mark.parametrize(("kind", "status"), [("dropout", "ok"), ("random", "not shown")])
def test_random_forwards(kind: str, status: str) -> None:
    found = verdict(kind)
    assert found.ok and statuses(found)["norms"] == status


def test_one_row_shows_nothing_and_says_so() -> None:
    found = check_private(Small(), {name: x[:1] for name, x in batch().items()}, mean_loss)
    assert statuses(found)["rows"] == "not shown"


def test_the_wrong_loss_reduction_is_named() -> None:
    found = verdict(loss_reduction="sum")
    assert statuses(found)["norms"] == "REFUSED" and "say loss_reduction='mean'" in str(found)
    summed = verdict(loss=lambda m, rows: F.cross_entropy(m(rows["x"]), rows["y"], reduction="sum"))
    assert statuses(summed)["norms"] == "REFUSED" and "say loss_reduction='sum'" in str(summed)
    assert "report this model" not in str(found) + str(summed)


def test_each_process_of_a_job_checks_for_itself() -> None:
    """Seen to fail: in a script under torchrun it asked to shard the model that is to be checked before it is sharded."""
    privacy = PrivacyConfig(
        noise_multiplier=1.0, target_delta=1e-5, max_grad_norm=1.0, expected_batch_size=2, dataset_size=ROWS, steps=1
    )
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="before make_private"):
            make_private(Small(), privacy)
        assert statuses(verdict()) == ALL_OK
    finally:
        torch.distributed.destroy_process_group()


def test_a_wrong_layer_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine measures and sums is compared with autograd, not with itself."""
    monkeypatch.setattr(fsdp_dp.layers.linear, "OuterProduct", lambda a, g: OuterProduct(a * 1.01, g))
    found = verdict()
    assert statuses(found)["norms"] == statuses(found)["clipped sum"] == "REFUSED"
    assert "weight'" in text_of(found, "clipped sum")


def test_a_batch_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tensor with a row"):
        check_private(Small(), {"x": torch.tensor(1.0)}, mean_loss)


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("REFUSED", 1)])
def test_the_command_prints_the_verdict_and_ends_with_its_code(
    status: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = Verdict(findings=(Finding(question="rows", status=status, text="why\nand what to do"),))
    monkeypatch.setattr(check, "verdict_on", lambda config: answer)
    with pytest.raises(SystemExit) as ended:
        check.check_job(OmegaConf.structured(check.TrainConfig()))
    assert ended.value.code == code
    assert f"  rows         {status:<11}why\n{'':26}and what to do" in capsys.readouterr().out
