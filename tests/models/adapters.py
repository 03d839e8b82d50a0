"""Models of the zoo with a part trained: `peft` adapters as its users make them, biases, some layers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.agreement import Subject
from tests.models.zoo import MODELS


def with_lora(name: str, **options: Any) -> Subject:
    """The zoo's model with LoRA matrices that are not zero, so that both have gradients."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's remarks on Conv1D and on tied weights, and its use of old names
            torch.manual_seed(0)
            model = get_peft_model(MODELS[name].model(), LoraConfig(r=3, lora_alpha=6, **options))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.double()

    return dataclasses.replace(MODELS[name], model=build)


def with_trained(name: str, chosen: Callable[[str], bool]) -> Subject:
    """The zoo's model with some parameters frozen."""

    def build() -> nn.Module:
        model = MODELS[name].model()
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen(parameter_name))
        return model

    return dataclasses.replace(MODELS[name], model=build)


QKV = ["query_key_value"]
ADAPTED: dict[str, Subject] = {
    "LoRA on attention": with_lora("GPT-NeoX", target_modules=QKV),
    "LoRA on Conv1D": with_lora("GPT-2", target_modules=["c_attn"]),
    "LoRA on all Linears": with_lora("GPT-NeoX", target_modules="all-linear"),
    "LoRA on embeddings": with_lora("GPT-NeoX", target_modules=[*QKV, "embed_in"]),
    "LoRA and biases": with_lora("GPT-NeoX", target_modules=QKV, bias="all"),
    "LoRA, rank-stabilized": with_lora("GPT-NeoX", target_modules=QKV, use_rslora=True),
    "DoRA on attention": with_lora("GPT-NeoX", target_modules=QKV, use_dora=True),
    "DoRA on all Linears": with_lora("Llama", target_modules="all-linear", use_dora=True),
    "LoRA, modules to save": with_lora(
        "BERT, classes", target_modules=["query", "value"], modules_to_save=["classifier", "LayerNorm"]
    ),
    "LoRA on convolutions": with_lora("ViT", target_modules=["projection", "q_proj"], modules_to_save=["classifier"]),
    "BiTFiT": with_trained("BERT", lambda name: name.endswith("bias")),
    "last block and head": with_trained("GPT-NeoX", lambda name: ".1." in name or "embed_out" in name),
    "embeddings only": with_trained("BERT", lambda name: "embeddings" in name),
}
