"""What programs do with Hugging Face models beyond one plain update; the docstrings are lines of docs/support.md."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsdp_dp import PrivacyError, UnsupportedModelError, make_private
from tests.agreement import (
    EXPECTED_BATCH_SIZE,
    Batch,
    Subject,
    assert_exact,
    config,
    loss_of,
    private_update,
    row_count,
    rows_of,
)
from tests.models.adapters import with_lora
from tests.models.variants import CONSTANT, VARIANTS, called_with, with_its_own_loss
from tests.models.zoo import (
    BY_TOKEN,
    ENCODER,
    EXPERTS,
    FLOAT32,
    GPT2,
    MODELS,
    T5,
    TEXT,
    language,
    lm,
    mlm,
    own_loss,
    subject,
    token_losses,
    translation,
)
from tests.oracle import clipped_sum, relative_error, trainable

DROPOUT: dict[str, Subject] = {
    "GPT-2": lm("GPT2LMHeadModel", GPT2 | {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
    "GPT-NeoX": lm("GPTNeoXForCausalLM", TEXT | {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    "BERT": mlm("BertForMaskedLM", ENCODER | {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}),
    "T5": subject("T5ForConditionalGeneration", T5 | {"dropout_rate": 0.3}, translation, token_losses, tolerance=1e-5),
    "LoRA": with_lora("GPT-NeoX", target_modules=["query_key_value"], lora_dropout=0.5),
}


def losses_of(dropped: Subject, model: nn.Module, batch: Batch) -> Tensor:
    """Of all rows, with dropout as a fixed seed draws it."""
    torch.manual_seed(5)
    return dropped.losses(model(**{n: x for n, x in batch.items() if n not in dropped.targets}), batch)


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout(name: str) -> None:
    """Dropout in training, exact: a row's gradient is that under the masks that were drawn."""
    dropped = DROPOUT[name]
    plain, batch, bound = dropped.model(), dropped.batch(), 0.5
    parameters = trainable(plain)
    by_row = [
        torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for loss in losses_of(dropped, plain, batch)
    ]
    rows = (
        {n: g if g is not None else p * 0 for (n, p), g in zip(parameters.items(), row, strict=True)} for row in by_row
    )
    expected = clipped_sum(rows, bound)
    model = dropped.model()
    engine = make_private(model, config(max_grad_norm=bound))
    losses_of(dropped, model, batch).mean().backward()
    engine.privatize()
    found = {n: p.grad * EXPECTED_BATCH_SIZE for n, p in trainable(model).items()}
    assert relative_error(found, expected) <= dropped.tolerance


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_mean_over_labels(name: str) -> None:
    """`model(**batch).loss` without `num_items_in_batch`, refused: it is a mean over the labels of all rows."""
    with pytest.raises(UnsupportedModelError, match="mean over all labels of the batch"):
        private_update(dataclasses.replace(MODELS[name], targets=(), losses=own_loss), bound=1.0)


def test_mean_over_labels_of_equal_rows() -> None:
    """The same where all rows happen to have as many labels, refused: a later batch may differ."""
    whole = {"input_ids": language()["input_ids"], "labels": language()["input_ids"]}
    with pytest.raises(UnsupportedModelError, match="mean over all labels of the batch"):
        private_update(
            dataclasses.replace(MODELS["GPT-2"], batch=lambda: whole, targets=(), losses=own_loss), bound=1.0
        )


def test_counted_labels() -> None:
    """`num_items_in_batch` counted from the batch, as the `Trainer` passes it, refused."""
    counted = called_with("GPT-2", num_items_in_batch=(language()["labels"] != -100).sum())
    with pytest.raises(PrivacyError, match="counted from the batch"):
        private_update(dataclasses.replace(counted, targets=(), losses=own_loss), bound=1.0)


def test_labels_given_and_the_loss_not_used() -> None:
    """Labels given to the model, its loss left alone for one of one's own, exact."""
    assert_exact(dataclasses.replace(MODELS["GPT-2"], targets=()))


def test_reentrant_checkpointing() -> None:
    """Reentrant activation checkpointing, refused: use `use_reentrant=False`."""

    def build() -> nn.Module:
        model: Any = MODELS["GPT-2"].model()
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": True})
        return model

    with pytest.raises(
        (UnsupportedModelError, PrivacyError), match=r"use_reentrant=False|no tensor that requires grad"
    ):
        private_update(dataclasses.replace(MODELS["GPT-2"], model=build), bound=1.0)


def test_lengths_that_change() -> None:
    """Microbatches of other lengths and other numbers of rows, exact."""
    gpt2 = MODELS["GPT-2"]
    model, batch = gpt2.model(), gpt2.batch()
    engine = make_private(model, config(max_grad_norm=1e6, loss_reduction="sum"))
    plain = gpt2.model()
    for rows, length in ((2, 6), (3, 4), (1, 5)):
        part = {n: x[:, :length] for n, x in rows_of(batch, torch.arange(rows)).items()}
        for one in (model, plain):
            loss_of(dataclasses.replace(gpt2, loss_reduction="sum"), one, part).backward()
    engine.privatize()
    found = {n: p.grad * EXPECTED_BATCH_SIZE for n, p in model.named_parameters()}
    assert relative_error(found, {n: p.grad for n, p in plain.named_parameters()}) <= gpt2.tolerance


@pytest.mark.parametrize("name", ["GPT-2, position ids of batch 1", "T5", "Swin"])
def test_one_row_and_then_more(name: str) -> None:
    """One row in the first microbatch, more in the next, exact, with position ids of batch 1, too."""
    subject = dataclasses.replace((VARIANTS | MODELS)[name], loss_reduction="sum")
    model, plain, batch = subject.model(), subject.model(), subject.batch()
    engine = make_private(model, config(max_grad_norm=1e6, loss_reduction="sum"))
    for rows in ([0], [1, 2], [3, 4]):
        for one in (model, plain):
            loss_of(subject, one, rows_of(batch, torch.tensor(rows))).backward()
    engine.privatize()
    found = {n: p.grad * EXPECTED_BATCH_SIZE for n, p in trainable(model).items()}
    assert relative_error(found, {n: p.grad for n, p in trainable(plain).items()}) <= subject.tolerance


def test_generation_between_steps() -> None:
    """`model.generate` with its cache, between microbatches: it changes nothing."""
    gpt2 = MODELS["GPT-2"]
    batch = gpt2.batch()
    model = gpt2.model()
    engine = make_private(model, config(max_grad_norm=0.5))
    for numbers in torch.arange(row_count(batch)).split(1):
        loss_of(gpt2, model, rows_of(batch, numbers)).backward()
        model.eval()
        model.generate(torch.tensor([[4, 5]]), max_new_tokens=2, pad_token_id=1)
        model.train()
    engine.privatize()
    found = {n: p.grad * EXPECTED_BATCH_SIZE for n, p in model.named_parameters()}
    expected = private_update(gpt2, bound=0.5, microbatch=1)
    assert relative_error(found, expected) <= gpt2.tolerance


def test_constant_number_of_labels() -> None:
    """`model(**batch, num_items_in_batch=N).loss` with one N for the whole run, exact."""
    counted = called_with("GPT-2", num_items_in_batch=CONSTANT)
    assert_exact(dataclasses.replace(counted, targets=(), losses=own_loss, loss_reduction="sum", tolerance=1e-5))


def test_positions_of_batch_1_before_the_rows() -> None:
    """Positions `[1, T]` as the model's first argument, outside of `engine.microbatch(mask)`, refused: how many rows?"""
    gpt2 = MODELS["GPT-2"]
    model, batch = gpt2.model(), gpt2.batch()
    make_private(model, config(max_grad_norm=1.0))
    with pytest.raises(PrivacyError, match=r"first input has one row and another one 5"):
        model(position_ids=torch.arange(6)[None], input_ids=batch["input_ids"])


def test_experts_one_row_at_a_time() -> None:
    """A mixture of experts with `experts_implementation="eager"`, one row a microbatch, exact."""
    assert_exact(
        lm("MixtralForCausalLM", EXPERTS | {"experts_implementation": "eager"}, tolerance=FLOAT32), microbatch=1
    )


def test_load_balancing_loss() -> None:
    """A mixture's load-balancing loss (`output_router_logits=True`), refused: it is a mean over the tokens of all rows."""
    balanced = EXPERTS | BY_TOKEN | {"output_router_logits": True, "router_aux_loss_coef": 1.0}
    with pytest.raises(UnsupportedModelError, match="when only other rows' inputs were exchanged"):
        private_update(with_its_own_loss("MixtralForCausalLM", balanced, language, divisor=CONSTANT), bound=1.0)
