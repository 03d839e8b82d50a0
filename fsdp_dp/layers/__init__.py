"""Layer rules: what a module's recorded input and output gradient say about its parameters. One family, one file.

A rule is a function ``rule(module, a, g, wanted) -> {parameter name: PerSampleGradient}`` that needs no weights, so it
works while FSDP has them resharded. Adding a layer is one file: write the rule, decorate it with `layer_rule`.
"""

from fsdp_dp.layers import convolution, embedding, hugging_face_norms, leaf, linear, normalization
from fsdp_dp.layers.linear import is_product
from fsdp_dp.layers.registry import (
    Rule,
    has_entries,
    has_rule,
    keeps,
    layer_rule,
    layouts,
    per_sample_gradients,
    refusal,
    refused,
    rule_for,
    supported,
    unknown_parameters,
)

__all__ = [
    "Rule",
    "convolution",
    "embedding",
    "has_entries",
    "has_rule",
    "hugging_face_norms",
    "is_product",
    "keeps",
    "layer_rule",
    "layouts",
    "leaf",
    "linear",
    "normalization",
    "per_sample_gradients",
    "refusal",
    "refused",
    "rule_for",
    "supported",
    "unknown_parameters",
]
