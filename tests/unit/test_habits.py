"""A layer's habit spares questions that were answered, and no others: of another form, or other layouts, they are asked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from fsdp_dp import make_private
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.habits import form_of
from fsdp_dp.recorder import Recorder
from fsdp_dp.records import NO_CALL
from tests.distributed.backends import privacy_config


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each layer's record was looked at in full."""
    counts: Counter[str] = Counter()
    examined = Recorder._examined

    def counting(self: Recorder, microbatch: Any, layer: str, record: Any, form: Any) -> Any:
        counts[layer] += 1
        return examined(self, microbatch, layer, record, form)

    monkeypatch.setattr(Recorder, "_examined", counting)
    return counts


def step(engine: PrivacyEngine, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    model(x).square().mean((1, 2)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def private() -> tuple[PrivacyEngine, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = make_private(model, privacy_config(max_grad_norm=1.0), optimizer)
    return engine, model, optimizer


def test_the_same_form_is_looked_at_once_and_another_again(asked: Counter[str]) -> None:
    """Seen to fail without habits (two more questions), and with a form that lacks the shapes (one less)."""
    engine, model, optimizer = private()
    rows = torch.randn(5, 7, 4)
    step(engine, model, optimizer, rows)  # learns
    step(engine, model, optimizer, rows)
    asked.clear()
    step(engine, model, optimizer, rows)
    assert asked == {}
    step(engine, model, optimizer, rows[:, :3])
    assert set(asked.values()) == {1}
    asked.clear()
    step(engine, model, optimizer, rows[:3])
    assert set(asked.values()) == {1}
    engine.detach()


def test_other_layouts_end_habits(asked: Counter[str]) -> None:
    """Seen to fail when `RowLayouts.forget` empties the layouts in place."""
    engine, model, optimizer = private()
    rows = torch.randn(5, 7, 4)
    for _ in range(2):
        step(engine, model, optimizer, rows)
    engine._recorder.layouts.forget()
    asked.clear()
    step(engine, model, optimizer, rows)
    assert set(asked.values()) == {1}
    engine.detach()


def test_only_plain_tensors_have_a_form() -> None:
    a, g = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
    assert form_of(NO_CALL, (a,), (g,), 2) is not None
    assert form_of(NO_CALL, (nn.Parameter(a),), (g,), 2) is None  # stands for DTensor and other classes
    assert form_of(NO_CALL, (a,), (None,), 2) is None
    assert form_of(NO_CALL, (a,), (g, g), 2) is None
