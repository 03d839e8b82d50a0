"""The shape of the decoder, apart from its code, so that a configuration can be checked before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from fsdp_dp.config import require_choice, require_integer, require_number

NORMS = ("layer_norm", "rms_norm")
EMBEDDINGS = ("separate", "tied")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A decoder-only transformer over `vocabulary_size` tokens and at most `block_size` positions.

    Args:
        layers, heads, width: number of blocks, attention heads per block, and features per position.
        mlp_width: hidden features of each block's MLP.
        norm: `layer_norm` or `rms_norm`.
        embeddings: `separate` input and output embeddings, or `tied` (one matrix for both).
        dropout: probability of zeroing a residual branch's feature while training.

    Raises:
        ValueError: a value is out of its range; the message names the option as `model.<field>`.
    """

    layers: int = 2
    heads: int = 4
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
        require_choice("model.norm", self.norm, NORMS)
        require_choice("model.embeddings", self.embeddings, EMBEDDINGS)
        require_number("model.dropout", self.dropout, at_least=0.0, below=1.0)
