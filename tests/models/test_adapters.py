"""Training a part of a model: adapters by `peft`, biases, some layers; and choosing another part between releases."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from fsdp_dp import PrivacyError, UnsupportedModelError, make_private
from tests.agreement import EXPECTED_BATCH_SIZE, config, expected_update, loss_of
from tests.models.adapters import ADAPTED, QKV, with_lora
from tests.models.zoo import MODELS
from tests.oracle import relative_error, trainable


@pytest.mark.parametrize("name", ["LoRA on attention", "BiTFiT"])
def test_frozen_parameters_cost_no_norm_no_memory_and_no_noise(name: str) -> None:
    model = ADAPTED[name].model()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine = make_private(model, config(max_grad_norm=1.0, noise_multiplier=1.0))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert sum(p.accumulator.numel() for p in engine.model.parameters) == count
    assert len(engine.layers) < sum(
        1 for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding | nn.LayerNorm)
    )
    loss_of(ADAPTED[name], model, ADAPTED[name].batch()).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(p, frozen[n]) and p.grad is None for n, p in model.named_parameters() if n in frozen)


def test_placement_after_attachment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the engine had been attached on another device. (A model that is moved before is like any other.)"""
    subject = ADAPTED["LoRA on attention"]
    model = subject.model()
    engine = make_private(model, config(max_grad_norm=1.0))
    monkeypatch.setattr(engine.model, "device", torch.device("meta"))
    with pytest.raises(PrivacyError, match=r"moved from meta to cpu after make_private.*model.to\('cpu'\) before"):
        loss_of(subject, model, subject.batch())


def test_dora_of_embeddings_is_refused() -> None:
    """Its magnitude is divided by a norm of the adapted table, of which there may be as many as rows of the batch."""
    model = with_lora("GPT-NeoX", target_modules=[*QKV, "embed_in"], use_dora=True).model()
    with pytest.raises(UnsupportedModelError, match=r"lora_(magnitude_vector|embedding_[AB]|[AB])"):
        engine = make_private(model, config(max_grad_norm=1.0))
        subject = MODELS["GPT-NeoX"]
        loss_of(subject, model, subject.batch()).backward()
        engine.privatize()


def test_another_part_is_trained_after_a_release() -> None:
    """Releases stay counted, and each is the oracle's for the part that was trained."""
    subject = MODELS["BERT"]
    model, batch = subject.model(), subject.batch()
    state = None
    for number, part in enumerate(("attention", "output"), start=1):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part in name)
        now = copy.deepcopy(model)
        expected, bound = expected_update(dataclasses.replace(subject, model=lambda now=now: now), bound=0.5)
        engine = make_private(model, config(max_grad_norm=bound))
        if state is not None:
            engine.load_state_dict(state)
        before = {n: p.detach().clone() for n, p in trainable(model).items()}
        loss_of(subject, model, batch).backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        found = {n: (before[n] - p.detach()) * EXPECTED_BATCH_SIZE for n, p in trainable(model).items()}
        assert relative_error(found, expected) <= subject.tolerance
        state = engine.state_dict()
        engine.detach()
        assert state["steps"] == number
