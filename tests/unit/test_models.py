"""The decoder: what it computes, and what private training and tensor parallelism need of it."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.gpt import GPT
from fsdp_dp.models.objective import IGNORED, row_losses

SMALL = GPTConfig(layers=2, heads=2, width=8, mlp_width=12, block_size=6, vocabulary_size=11)


def build(config: GPTConfig = SMALL) -> GPT:
    torch.manual_seed(0)
    return GPT(config).double()


def tokens(rows: int, length: int = 6) -> torch.Tensor:
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("embeddings", ["separate", "tied"])
def test_logits_for_every_position(norm, embeddings):
    model = build(replace(SMALL, norm=norm, embeddings=embeddings))
    assert model(tokens(3)).shape == (3, 6, 11)
    assert model(tokens(3, length=4)).shape == (3, 4, 11)


def test_the_default_has_the_size_that_is_stated():
    assert sum(parameter.numel() for parameter in GPT(GPTConfig()).parameters()) == 141_056


def test_a_position_sees_no_later_token():
    model, x = build(), tokens(1)
    changed = x.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_attention_is_the_textbook_formula():
    attention = build().blocks[0].attention
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    heads = []
    for head in range(2):
        part = slice(head * 4, head * 4 + 4)
        query, key, value = attention.query(x)[..., part], attention.key(x)[..., part], attention.value(x)[..., part]
        scores = query @ key.transpose(1, 2) / 4**0.5
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
        heads.append(scores.softmax(-1) @ value)
    torch.testing.assert_close(attention(x), attention.output(torch.cat(heads, -1)))


def test_half_of_the_features_are_half_of_the_heads():
    """What a tensor-parallel rank computes: the first head alone."""
    whole = build().blocks[0].attention
    half = build().blocks[0].attention
    for name in ("query", "key", "value"):
        layer = getattr(half, name)
        layer.weight, layer.bias = nn.Parameter(layer.weight[:4]), nn.Parameter(layer.bias[:4])
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(half.split_heads(half.query(x)), whole.split_heads(whole.query(x))[:, :1])


def test_tied_embeddings_are_one_parameter():
    separate, tied = build(), build(replace(SMALL, embeddings="tied"))
    assert tied.head.weight is tied.token_embedding.weight
    assert len(list(separate.parameters())) == len(list(tied.parameters())) + 1


def test_only_layers_of_known_gradient_own_parameters():
    owners = {type(module) for module in build().modules() if list(module.parameters(recurse=False))}
    assert owners == {nn.Linear, nn.Embedding, nn.LayerNorm}


def test_every_layer_sees_the_batch_first():
    model, seen = build(), {}
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: inputs[0].shape[0]}))
    model(tokens(3))
    assert "position_embedding" in seen
    assert set(seen.values()) == {3}


def test_dropout_acts_only_in_training():
    model = build(replace(SMALL, dropout=0.5))
    x = tokens(2)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_too_long_a_row_is_refused():
    with pytest.raises(ValueError, match=r"found 7 tokens per row, expected at most 6; raise model.block_size"):
        build()(tokens(1, length=7))


def test_a_rows_loss_depends_on_that_row_alone():
    model, x, y = build(), tokens(4), tokens(4).flip(1)
    alone = torch.cat([row_losses(model(x[i : i + 1]), y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(row_losses(model(x), y), alone)


def test_row_loss_is_the_mean_cross_entropy_over_positions():
    logits, targets = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    expected = torch.stack([F.cross_entropy(row, target) for row, target in zip(logits, targets, strict=True)])
    torch.testing.assert_close(row_losses(logits, targets), expected)
    assert row_losses(logits.bfloat16(), targets).dtype == torch.float32


def test_padding_counts_zero_and_leaves_the_divisor():
    logits, targets = torch.randn(1, 4, 11), torch.randint(0, 11, (1, 4))
    targets[0, 2:] = IGNORED
    expected = F.cross_entropy(logits[0, :2], targets[0, :2], reduction="sum") / 4
    torch.testing.assert_close(row_losses(logits, targets)[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "model.layers must be an integer of at least 1"),
        ({"width": 63}, "model.width must be a multiple of model.heads=4, found 63"),
        ({"norm": "batch_norm"}, "model.norm must be one of 'layer_norm', 'rms_norm'"),
        ({"embeddings": "none"}, "model.embeddings must be one of 'separate', 'tied'"),
        ({"dropout": 1.0}, "model.dropout must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


def test_the_models_need_torch_alone():
    code = "import sys, fsdp_dp.models.gpt, fsdp_dp.models.objective; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"hydra", "omegaconf", "opacus", "prv_accountant", "tensorboard"} & set(loaded)
