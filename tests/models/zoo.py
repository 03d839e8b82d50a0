"""Hugging Face models as people bring them: small configurations, random weights, nothing changed.

`MODELS` names a `Subject` for each: a model in training mode, a batch with rows of different lengths, padding masks and
labels of -100, and the loss of each row, from the model's logits or as the model itself computes it.

Legend: N rows, T positions, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.agreement import Batch, Subject

N, T, V, PAD = 5, 6, 29, 1
CONSTANT = 7  # stands for num_items_in_batch: any number that does not depend on the data
FLOAT32 = 1e-5  # where a model computes in float32 whatever its weights are

TOKENS = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
TEXT = TOKENS | SIZES | {"max_position_embeddings": 16}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 6}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = TEXT | NO_DROPOUT
GPT2 = TOKENS | {
    "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0
}  # fmt: skip
T5 = TOKENS | {
    "d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
IMAGE = SIZES | NO_DROPOUT | {"image_size": 8, "patch_size": 4, "num_labels": 3}

# ------------------------------------------------------------------------------------------------------------ batches


def random() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def tokens() -> Batch:
    """Token ids, padded on the right; the first row and the last are whole, and no two in between are alike."""
    ids = torch.randint(4, V, (N, T), generator=random())
    lengths = torch.tensor([T, 3, 2, 4, T])
    mask = torch.arange(T) < lengths[:, None]
    return {"input_ids": torch.where(mask, ids, PAD), "attention_mask": mask.long()}


def language() -> Batch:
    """Each token is its own label; padding has none."""
    batch = tokens()
    return batch | {"labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)}


def masked_language() -> Batch:
    """Labels at every second position."""
    batch = language()
    return batch | {"labels": torch.where(torch.arange(T) % 2 == 0, batch["labels"], -100)}


def classes() -> Batch:
    return tokens() | {"labels": torch.arange(N) % 3}


def translation() -> Batch:
    """An encoder's tokens, and labels of another length, which the decoder is given shifted by one."""
    labels = language()["labels"][:, 1:]
    ids = F.pad(labels, (1, 0), value=0)[:, :-1]
    return tokens() | {"labels": labels, "decoder_input_ids": torch.where(ids == -100, PAD, ids)}


def images(size: int = 8) -> Batch:
    pixels = torch.randn(N, 3, size, size, generator=random(), dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.arange(N) % 3}


# ------------------------------------------------------------------------------------------------------------- losses


def next_token_losses(outputs: Any, batch: Batch) -> Tensor:
    return _token_losses(outputs.logits[:, :-1], batch["labels"][:, 1:])


def token_losses(outputs: Any, batch: Batch) -> Tensor:
    return _token_losses(outputs.logits, batch["labels"])


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1) / T


def class_losses(outputs: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs.logits, batch["labels"], reduction="none")


def hidden_losses(outputs: Any, batch: Batch) -> Tensor:
    return (outputs.last_hidden_state - 0.3).square().flatten(1).mean(1)


def pooled_losses(outputs: Any, batch: Batch) -> Tensor:
    return hidden_losses(outputs, batch) + (outputs.pooler_output - 0.1).square().sum(1)


def own_loss(outputs: Any, batch: Batch) -> Tensor:
    """As the model computes it."""
    return outputs.loss


# ------------------------------------------------------------------------------------------------------------- models


def build(architecture: str, config: dict[str, Any], attention: str | None = None) -> nn.Module:
    """In its initial state, the same on every call, in float64 and in training mode."""
    kind = getattr(transformers, architecture)
    made = kind.config_class(**config)
    if attention is not None:
        made._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(made)
        with torch.no_grad():  # norms and biases start at ones and zeros, where mistakes can hide
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double().train()


def subject(
    architecture: str, config: dict[str, Any], batch: Any, losses: Any, *, attention: str | None = None, **options: Any
) -> Subject:
    made = functools.partial(build, architecture, config, attention)
    return Subject(model=made, batch=batch, losses=losses, **options)


def with_its_own_loss(architecture: str, config: dict[str, Any], batch: Any, *, divisor: int | None = None) -> Subject:
    """The loss comes from the model: a sum over tokens divided by a constant, or the mean over rows of one label each."""
    if divisor is None:
        return subject(architecture, config, batch, own_loss, targets=(), tolerance=FLOAT32)
    return subject(
        architecture, config, lambda: batch() | {"num_items_in_batch": divisor}, own_loss,
        targets=(), loss_reduction="sum", tolerance=FLOAT32,
    )  # fmt: skip


MODELS: dict[str, Subject] = {
    "GPT-2": subject("GPT2LMHeadModel", GPT2, language, next_token_losses),
    "GPT-NeoX": subject("GPTNeoXForCausalLM", TEXT | {"hidden_dropout": 0.0}, language, next_token_losses),
    "BERT": subject("BertForMaskedLM", ENCODER, masked_language, token_losses),
}
