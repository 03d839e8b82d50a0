"""Models of `transformers`, with what `peft` adds to them, as the application wants a model: inputs in, logits out.

Inputs are token ids, in which negative ones are padding, or images. Weights come from the Hub, from a folder, or at random
from the name of an architecture; that needs no network.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_dp.models.config import IMAGE_CLASSES, LANGUAGE, TEXT_CLASSES, HuggingFaceConfig

AUTO_CLASSES = {
    LANGUAGE: "AutoModelForCausalLM",
    TEXT_CLASSES: "AutoModelForSequenceClassification",
    IMAGE_CLASSES: "AutoModelForImageClassification",
}
CLASSIFIERS = ("classifier", "score")
INSTALL = "pip install 'fsdp-dp[hf]'"


class HuggingFaceModel(nn.Module):
    """The model behind one positional input, which is what the engine takes rows from.

    Attributes:
        blocks: its repeated layers, which become FSDP units.
    """

    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        self.model, self.head = model, head

    @property
    def blocks(self) -> list[nn.Module]:
        """The outermost modules that stand in a list."""
        found: dict[str, nn.Module] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{block}.") for block in found):
                found |= {f"{name}.{number}": block for number, block in enumerate(module)}
        return list(found.values())

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits: [B, T, V] of a language model, else [B, classes]."""
        if self.head == IMAGE_CLASSES:
            return self.model(pixel_values=inputs).logits
        padded_BT = inputs < 0
        ids_BT = inputs.masked_fill(padded_BT, getattr(self.model.config, "pad_token_id", None) or 0)
        if self.head == LANGUAGE:  # padding is at the end, where no position that counts can see it
            return self.model(input_ids=ids_BT, use_cache=False).logits
        return self.model(input_ids=ids_BT, attention_mask=(~padded_BT).long()).logits


def build(config: HuggingFaceConfig, *, weights: bool = True) -> HuggingFaceModel:
    """The model in training mode; without `weights`, the pretrained ones are not loaded (to count parameters).

    Raises:
        ValueError: a package is missing, the model cannot be found or loaded, or LoRA does not fit it.
    """
    transformers = _transformers()
    kind = getattr(transformers, AUTO_CLASSES[config.head])
    made = transformers_config(config)
    if config.pretrained is not None and weights:
        try:
            model = kind.from_pretrained(
                config.pretrained,
                config=made,
                dtype=torch.float32,  # whatever they were saved in: precision.compute is another matter
                ignore_mismatched_sizes=config.head != LANGUAGE,
            )
        except (OSError, ValueError) as error:
            raise ValueError(_not_found(config.pretrained, error)) from error
    else:
        model = kind.from_config(made, dtype=torch.float32)
    if config.lora_rank is not None:
        model = with_lora(model, config)
    return HuggingFaceModel(model, config.head).train()


def transformers_config(config: HuggingFaceConfig) -> Any:
    """`transformers`' own configuration of the model."""
    auto = _transformers().AutoConfig
    options = dict(config.options)
    if config.head != LANGUAGE:
        options["num_labels"] = config.classes
    if config.head == IMAGE_CLASSES and config.pretrained is None:
        options = {"image_size": config.image_size, "num_channels": config.channels} | options
    try:
        if config.pretrained is not None:
            return auto.from_pretrained(config.pretrained, **options)
        return auto.for_model(config.model_type, **options)
    except OSError as error:
        raise ValueError(_not_found(str(config.pretrained), error)) from error
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"model.model_type={config.model_type}, model.options={options}: transformers refuses: {_first_line(error)}"
        ) from error


def vocabulary_size(config: HuggingFaceConfig) -> int:
    """How many token ids the model knows.

    Raises:
        ValueError: a row is longer than the model's positions.
    """
    made = transformers_config(config).get_text_config()
    positions = getattr(made, "max_position_embeddings", None) or config.block_size
    if config.block_size > positions:
        raise ValueError(
            f"model.block_size must be at most the model's {positions} positions, found {config.block_size}."
        )
    return int(made.vocab_size)


def with_lora(model: nn.Module, config: HuggingFaceConfig) -> nn.Module:
    """LoRA on the layers that are asked for; the classifier, which starts at random, is trained as a whole."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"model.lora_rank needs the package peft: {INSTALL}") from error
    assert config.lora_rank is not None
    classifiers = [name for name, _ in model.named_children() if name in CLASSIFIERS]
    options = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,  # type: ignore[arg-type]
        target_modules=config.lora_targets,
        modules_to_save=classifiers or None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # of GPT-2's Conv1D; peft sets it
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft reads names that transformers renamed
        try:
            return peft.get_peft_model(model, options)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"model.lora_targets={config.lora_targets}: {_first_line(error)} The model's layers end in: "
                f"{', '.join(sorted(_layer_names(model)))}"
            ) from error


def _layer_names(model: nn.Module) -> set[str]:
    return {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "weight")}


def _transformers() -> Any:
    try:
        import transformers

        transformers.utils.logging.disable_progress_bar()
    except ImportError as error:
        raise ValueError(f"model.architecture=hugging_face needs the package transformers: {INSTALL}") from error
    return transformers


def _not_found(name: str, error: Exception) -> str:
    return (
        f"model.pretrained={name}: could not be loaded ({_first_line(error)}). It must be a name on the Hub, which needs a "
        f"network or an earlier download, or a folder: on a machine with a network, `hf download {name} --local-dir "
        "FOLDER`, copy it, and give model.pretrained=FOLDER. To try without weights: model.pretrained=null "
        "model.model_type=gpt2 (or bert, vit, ...)"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
