"""From a model's options to the model, by `model.architecture`."""

from __future__ import annotations

import torch
from torch import nn

from fsdp_dp.models.config import GPTConfig, HuggingFaceConfig, ModelConfig, ResNetConfig
from fsdp_dp.models.gpt import GPT
from fsdp_dp.models.llama import Llama
from fsdp_dp.models.resnet import ResNet


def build(config: ModelConfig, *, weights: bool = True) -> nn.Module:
    """The model that `config` names, unsharded, on the default device: one input in, logits out.

    Its `blocks` are what becomes FSDP units. Without `weights`, pretrained ones are not loaded.
    """
    if isinstance(config, ResNetConfig):
        return ResNet(config)
    if isinstance(config, HuggingFaceConfig):
        from fsdp_dp.models import hugging_face

        return hugging_face.build(config, weights=weights)
    assert isinstance(config, GPTConfig)
    return Llama(config) if config.architecture == "llama" else GPT(config)


def parameter_count(config: ModelConfig) -> int:
    """Trainable elements of the whole model; nothing is allocated."""
    with torch.device("meta"):
        model = build(config, weights=False)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def vocabulary_size(config: ModelConfig) -> int:
    """How many token ids a model of text knows."""
    if isinstance(config, HuggingFaceConfig):
        from fsdp_dp.models import hugging_face

        return hugging_face.vocabulary_size(config)
    assert isinstance(config, GPTConfig)
    return config.vocabulary_size
