"""Models of the zoo, used in other ways: eager attention, losses of their own, other positions, caches and outputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.agreement import Batch, Subject
from tests.models.zoo import (
    ENCODER,
    FLOAT32,
    GPT2,
    GROUPED,
    IMAGE,
    MODELS,
    PAD,
    T5,
    N,
    T,
    classes,
    images,
    language,
    lm,
    mlm,
    own_loss,
    subject,
    token_losses,
    translation,
)

CONSTANT = 7  # stands for num_items_in_batch: any number that does not depend on the data


def with_its_own_loss(
    architecture: str, config: dict[str, Any], batch: Callable[[], Batch], *, divisor: int | None = None
) -> Subject:
    """A sum over labels that the model divides by a constant; or the mean over rows of one label each."""
    if divisor is None:
        return subject(architecture, config, batch, own_loss, targets=(), tolerance=FLOAT32)
    divided = functools.partial(_with, batch, num_items_in_batch=divisor)
    return subject(architecture, config, divided, own_loss, targets=(), loss_reduction="sum", tolerance=FLOAT32)


def _with(batch: Callable[[], Batch], **arguments: Any) -> Batch:
    return batch() | arguments


def called_with(name: str, **arguments: Any) -> Subject:
    return dataclasses.replace(MODELS[name], batch=functools.partial(_with, MODELS[name].batch, **arguments))


def padded_on_the_left() -> Batch:
    return {name: x.flip(1) for name, x in language().items()}


def masked_last() -> Batch:
    """The decoder has a mask too; the first rows are without padding, so that their masks leave no trace."""
    batch = translation()
    batch |= {"decoder_attention_mask": (batch["decoder_input_ids"] != PAD).long()}
    order = batch["attention_mask"].sum(1).argsort(descending=True)
    return {name: x[order] for name, x in batch.items()}


def masked_first() -> Batch:
    return {name: x.flip(0) for name, x in masked_last().items()}


def of_a_tuple(outputs: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs[0][:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1) / T


def of_all_outputs(outputs: Any, batch: Batch) -> Tensor:
    """The loss also looks at hidden states and attentions."""
    extra = [*outputs.hidden_states, *outputs.attentions]
    return of_a_tuple((outputs.logits,), batch) + sum((x.square().flatten(1).mean(1) for x in extra), torch.zeros(()))


def checkpointed(name: str) -> Subject:
    """Every block is recomputed in backward."""

    def build() -> nn.Module:
        model: Any = MODELS[name].model()
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        return model

    return dataclasses.replace(MODELS[name], model=build)


def without_position_table(name: str) -> Subject:
    """A model with the table frozen that it reads itself."""

    def build() -> nn.Module:
        model = MODELS[name].model()
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("rel_embeddings" not in parameter_name)
        return model

    return dataclasses.replace(MODELS[name], model=build)


def eager(make: Callable[..., Subject], *arguments: Any, **options: Any) -> Subject:
    return make(*arguments, attention="eager", **options)


POSITIONS = torch.arange(T)[None]
VARIANTS: dict[str, Subject] = {
    "GPT-2, eager attention": eager(lm, "GPT2LMHeadModel", GPT2),
    "Llama, eager attention": eager(lm, "LlamaForCausalLM", GROUPED, tolerance=FLOAT32),
    "BERT, eager attention": eager(mlm, "BertForMaskedLM", ENCODER),
    "T5, eager attention": eager(
        subject, "T5ForConditionalGeneration", T5, translation, token_losses, tolerance=FLOAT32
    ),
    "ViT, eager attention": eager(subject, "ViTForImageClassification", IMAGE, images, MODELS["ViT"].losses),
    "GPT-2, its own loss": with_its_own_loss("GPT2LMHeadModel", GPT2, language, divisor=CONSTANT),
    "Llama, its own loss": with_its_own_loss("LlamaForCausalLM", GROUPED, language, divisor=CONSTANT),
    "BERT classes, its own loss": with_its_own_loss(
        "BertForSequenceClassification", ENCODER | {"num_labels": 3}, classes
    ),
    "ViT, its own loss": with_its_own_loss("ViTForImageClassification", IMAGE, images),
    "GPT-2, position ids of batch 1": called_with("GPT-2", position_ids=POSITIONS),
    "BERT, position ids of batch 1": called_with("BERT", position_ids=POSITIONS),
    "Llama, position ids of batch 1": called_with("Llama", position_ids=POSITIONS),
    "GPT-2, position ids of every row": called_with("GPT-2", position_ids=POSITIONS.expand(N, T)),
    "GPT-2, padded on the left": dataclasses.replace(MODELS["GPT-2"], batch=padded_on_the_left),
    "Llama, padded on the left": dataclasses.replace(MODELS["Llama"], batch=padded_on_the_left),
    "GPT-2, no cache": called_with("GPT-2", use_cache=False),
    "GPT-2, outputs in a tuple": dataclasses.replace(called_with("GPT-2", return_dict=False), losses=of_a_tuple),
    "GPT-2, hidden states and attentions in the loss": dataclasses.replace(
        eager(lm, "GPT2LMHeadModel", GPT2),
        batch=functools.partial(_with, language, output_hidden_states=True, output_attentions=True),
        losses=of_all_outputs,
    ),
    "GPT-2, activation checkpointing": checkpointed("GPT-2"),
    "Llama, activation checkpointing": checkpointed("Llama"),
    "T5, activation checkpointing": checkpointed("T5"),
    "Mamba, activation checkpointing": checkpointed("Mamba"),
    "T5, masks that the first microbatch has no use for": dataclasses.replace(MODELS["T5"], batch=masked_last),
    "T5, masks that the last microbatch has no use for": dataclasses.replace(MODELS["T5"], batch=masked_first),
    "DeBERTa-v2, position table frozen": without_position_table("DeBERTa-v2"),
}
