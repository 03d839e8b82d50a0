"""Models as options, apart from their code, so that a configuration can be checked before torch is loaded.

`MODELS` maps `model.architecture` to the dataclass that holds the model's options; `build.py` builds from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fsdp_dp.config import require_choice, require_integer, require_number

DECODERS = ("gpt", "llama")
NORMS = ("layer_norm", "rms_norm")
EMBEDDINGS = ("separate", "tied")
# What a row is: a text of which each token is predicted, or a text or an image with one label.
LANGUAGE, TEXT_CLASSES, IMAGE_CLASSES = TASKS = ("language", "text_classes", "image_classes")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all models have; `architecture` says which dataclass of `MODELS` holds the rest."""

    architecture: str

    @property
    def task(self) -> str:
        """One of `TASKS`."""
        raise NotImplementedError

    @property
    def in_words(self) -> str:
        """The model for a report."""
        raise NotImplementedError

    @property
    def tensor_parallel_parts(self) -> dict[str, int]:
        """What tensor parallelism splits, by option; nothing where it cannot."""
        return {}

    def _check_integers(self, *names: str) -> None:
        for name in names:
            require_integer(f"model.{name}", getattr(self, name), at_least=1)


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """A decoder-only transformer over `vocabulary_size` tokens and at most `block_size` positions.

    Args:
        architecture: `gpt` (GPT-2's layout: learned positions, GELU, biases) or `llama` (rotary positions, SwiGLU, none).
        layers, heads, width: number of blocks, attention heads per block, and features per position.
        key_value_heads: heads of keys and values, each shared by equally many of `heads` (llama); null for as many.
        mlp_width: hidden features of each block's MLP.
        norm: `layer_norm` or `rms_norm`.
        embeddings: `separate` input and output embeddings, or `tied` (one matrix for both).
        dropout: probability of zeroing a residual branch's feature while training.

    Raises:
        ValueError: a value is out of its range; the message names the option as `model.<field>`.
    """

    architecture: str = "gpt"
    layers: int = 2
    heads: int = 4
    key_value_heads: int | None = None
    width: int = 64
    mlp_width: int = 256
    block_size: int = 128
    vocabulary_size: int = 256
    norm: str = "layer_norm"
    embeddings: str = "separate"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._check_integers("layers", "heads", "width", "mlp_width", "block_size", "vocabulary_size")
        if self.width % self.heads:
            raise ValueError(
                f"model.width must be a multiple of model.heads={self.heads}, found {self.width}: "
                "each head takes an equal share of the width."
            )
        self._check_architecture()
        require_choice("model.norm", self.norm, NORMS)
        require_choice("model.embeddings", self.embeddings, EMBEDDINGS)
        require_number("model.dropout", self.dropout, at_least=0.0, below=1.0)

    @property
    def task(self) -> str:
        return LANGUAGE

    @property
    def in_words(self) -> str:
        return f"{self.architecture}, {self.layers} layers, width {self.width}, block size {self.block_size}"

    @property
    def tensor_parallel_parts(self) -> dict[str, int]:
        return {"heads": self.heads, "key_value_heads": self.shared_heads, "mlp_width": self.mlp_width}

    @property
    def shared_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    def _check_architecture(self) -> None:
        require_choice("model.architecture", self.architecture, DECODERS)
        if self.architecture == "gpt" and self.key_value_heads is not None:
            raise ValueError(
                f"model.key_value_heads is an option of llama, found {self.key_value_heads} with "
                "model.architecture=gpt: leave it out."
            )
        require_integer("model.key_value_heads", self.shared_heads, at_least=1)
        if self.heads % self.shared_heads:
            raise ValueError(
                f"model.key_value_heads must divide model.heads={self.heads}, found {self.key_value_heads}: each is shared "
                "by equally many heads."
            )
        if self.architecture == "llama" and self.width // self.heads % 2:
            raise ValueError(
                f"model.width / model.heads must be even for model.architecture=llama, found {self.width} / {self.heads}: "
                "rotary positions turn pairs of features."
            )


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(ModelConfig):
    """A small residual network with GroupNorm, for images.

    Args:
        channels, image_size, classes: of an image (square), and how many labels there are.
        stages: each after the first has half the resolution and twice the channels.
        blocks: residual blocks of a stage.
        width: channels of the first stage.
        groups: of the normalisation; divides `width`.
    """

    architecture: str = "resnet"
    channels: int = 3
    image_size: int = 32
    classes: int = 10
    stages: int = 3
    blocks: int = 1
    width: int = 32
    groups: int = 8

    def __post_init__(self) -> None:
        require_choice("model.architecture", self.architecture, ("resnet",))
        self._check_integers("channels", "image_size", "stages", "blocks", "width", "groups")
        require_integer("model.classes", self.classes, at_least=2)
        if self.width % self.groups:
            raise ValueError(f"model.width must be a multiple of model.groups={self.groups}, found {self.width}.")
        if self.image_size < 2 ** (self.stages - 1):
            raise ValueError(
                f"model.stages={self.stages} halve an image {self.stages - 1} times, which model.image_size="
                f"{self.image_size} does not allow: lower model.stages."
            )

    @property
    def task(self) -> str:
        return IMAGE_CLASSES

    @property
    def in_words(self) -> str:
        return (
            f"resnet with GroupNorm, {self.stages} stages of {self.blocks} block(s), width {self.width}, "
            f"{self.channels}x{self.image_size}x{self.image_size} images, {self.classes} classes"
        )


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig(ModelConfig):
    """A model of `transformers`, whole or with LoRA.

    Args:
        head: what it is trained for: `language` (AutoModelForCausalLM), `text_classes`
            (AutoModelForSequenceClassification) or `image_classes` (AutoModelForImageClassification).
        pretrained: a name on the Hub or a folder with the weights to start from; null for random ones, of `model_type`.
        model_type: `transformers`' name of the architecture (`gpt2`, `bert`, `vit`), with random weights.
        options: of `transformers`' configuration, by its own names: {n_layer: 2}.
        block_size: tokens of a row of text, at most.
        channels, image_size: of images.
        classes: how many labels there are.
        lora_rank: train LoRA matrices of this rank (`peft`) and the classifier, and freeze the rest; null trains all.
        lora_alpha: LoRA's scale is alpha / rank; null takes twice the rank.
        lora_targets: names of the layers that get LoRA; null takes `peft`'s choice for the architecture.
    """

    architecture: str = "hugging_face"
    head: str = LANGUAGE
    pretrained: str | None = None
    model_type: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    block_size: int = 128
    channels: int = 3
    image_size: int = 224
    classes: int = 2
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: list[str] | None = None

    def __post_init__(self) -> None:
        require_choice("model.architecture", self.architecture, ("hugging_face",))
        require_choice("model.head", self.head, TASKS)
        self._check_integers("block_size", "channels", "image_size")
        require_integer("model.classes", self.classes, at_least=2)
        if (self.pretrained is None) == (self.model_type is None):
            raise ValueError(
                "Exactly one of model.pretrained (weights to start from) and model.model_type (an architecture with random "
                f"weights) is needed, found {self.pretrained} and {self.model_type}: for example model.pretrained=null "
                "model.model_type=gpt2."
            )
        if self.lora_rank is not None:
            require_integer("model.lora_rank", self.lora_rank, at_least=1)
        elif self.lora_alpha is not None or self.lora_targets is not None:
            raise ValueError("model.lora_alpha and model.lora_targets need model.lora_rank, found null.")
        if self.lora_alpha is not None:
            require_number("model.lora_alpha", self.lora_alpha, above=0.0)

    @property
    def task(self) -> str:
        return self.head

    @property
    def in_words(self) -> str:
        weights = f"{self.model_type}, random weights" if self.pretrained is None else f"{self.pretrained}, pretrained"
        trained = "" if self.lora_rank is None else f", LoRA of rank {self.lora_rank}"
        return f"{weights}, for {self.head.replace('_', ' ')}{trained}"


MODELS: dict[str, type[ModelConfig]] = {
    **dict.fromkeys(DECODERS, GPTConfig),
    "resnet": ResNetConfig,
    "hugging_face": HuggingFaceConfig,
}


def model_class(architecture: Any) -> type[ModelConfig]:
    """The dataclass of an architecture's options; raises ValueError for a name that is none."""
    require_choice("model.architecture", architecture, tuple(MODELS))
    return MODELS[architecture]


def model_config(options: Mapping[str, Any]) -> ModelConfig:
    """The options of a model, from a mapping as `config.yaml` has it (without architecture: `gpt`)."""
    return model_class(options.get("architecture", "gpt"))(**options)


TextModel = GPTConfig | HuggingFaceConfig
ImageModel = ResNetConfig | HuggingFaceConfig
