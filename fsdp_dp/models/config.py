"""The shape of the decoder, apart from its code, so that a configuration can be checked before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from fsdp_dp.config import require_choice, require_integer, require_number

ARCHITECTURES = ("gpt", "llama")
NORMS = ("layer_norm", "rms_norm")
EMBEDDINGS = ("separate", "tied")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
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
        for name in ("layers", "heads", "width", "mlp_width", "block_size", "vocabulary_size"):
            require_integer(f"model.{name}", getattr(self, name), at_least=1)
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
    def shared_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    def _check_architecture(self) -> None:
        require_choice("model.architecture", self.architecture, ARCHITECTURES)
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
