"""Llama's layout: what it computes, and that its rows are clipped exactly."""

from dataclasses import replace

import pytest
import torch

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.llama import Llama, initialize, rotary_table, rotate
from fsdp_dp.models.objective import row_losses
from tests.oracle import clipped_sum, norm, row_gradients

SMALL = GPTConfig(
    architecture="llama",
    layers=2,
    heads=4,
    key_value_heads=2,
    width=16,
    mlp_width=12,
    block_size=6,
    vocabulary_size=11,
    norm="rms_norm",
)


def build(config: GPTConfig = SMALL) -> Llama:
    torch.manual_seed(0)
    return Llama(config).double()


def tokens(rows: int, length: int = 6) -> torch.Tensor:
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"key_value_heads": None}, {"embeddings": "tied"}])
def test_every_row_is_clipped_as_the_oracle_does(options):
    model, x = build(replace(SMALL, **options)), tokens(4, length=7)
    rows = (x[:, :-1], x[:, 1:])
    gradients = list(row_gradients(model, rows, row_losses))
    bound = sorted(map(norm, gradients))[1] * 1.01  # clips half of the rows
    expected = clipped_sum(iter(gradients), bound)
    privacy = PrivacyConfig(
        max_grad_norm=bound,
        noise_multiplier=0.0,
        expected_batch_size=4,
        dataset_size=100,
        target_delta=1e-5,
        sampling="external_poisson",
    )
    engine = make_private(model, privacy)
    row_losses(model(rows[0]), rows[1]).mean().backward()
    engine.privatize()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(4 * parameter.grad, expected[name], rtol=1e-10, atol=1e-11)


def test_scores_depend_on_the_distance_of_positions_alone():
    table = rotary_table(9, 8).double()
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turned_query, turned_key = (rotate(x.expand(1, 1, 9, 8), table)[0, 0] for x in (query, key))
    scores = turned_query @ turned_key.T
    for distance in range(-8, 9):
        torch.testing.assert_close(
            scores.diagonal(distance), scores.diagonal(distance)[:1].expand(9 - abs(distance)), rtol=0, atol=1e-5
        )
    assert not torch.isclose(scores[0, 0], scores[0, 3])


def test_a_position_sees_no_later_token():
    model, x = build(), tokens(1)
    changed = x.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_a_model_made_on_meta_is_complete_after_initialize():
    torch.manual_seed(0)
    expected = Llama(SMALL)
    with torch.device("meta"):
        model = Llama(SMALL)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    initialize(expected)
    torch.manual_seed(0)
    initialize(model)
    assert torch.equal(model(tokens(2)), expected(tokens(2)))


def test_too_long_a_row_is_refused():
    with pytest.raises(ValueError, match=r"found 7 tokens per row, expected at most 6; raise model.block_size"):
        build()(tokens(1, length=7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "bert"}, "model.architecture must be one of 'gpt', 'llama'"),
        ({"key_value_heads": 3}, "model.key_value_heads must divide model.heads=4, found 3"),
        ({"key_value_heads": 0}, "model.key_value_heads must be an integer of at least 1"),
        ({"width": 12}, "must be even for model.architecture=llama, found 12 / 4"),
        ({"architecture": "gpt"}, "model.key_value_heads is an option of llama, found 2 with model.architecture=gpt"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


@pytest.mark.slow
def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    model, x = build(), tokens(3)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=11,
            hidden_size=16,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=torch.finfo(torch.float64).eps,
            rope_theta=10_000.0,
        )
    ).double()
    names = {
        "token_embedding": "model.embed_tokens", "blocks": "model.layers", "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state["model.norm.weight" if name == "norm.weight" else name.replace("head.", "lm_head.", 1)] = value
    peer.load_state_dict(state)
    torch.testing.assert_close(model(x), peer(x).logits, rtol=1e-6, atol=1e-6)
