"""Models of classes, and one document a row: every row is clipped as the oracle does, padding or not."""

from pathlib import Path

import pytest
import torch

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.data.packing import RowDataset, split_row, tokens_one_per_document
from fsdp_dp.models.build import build, parameter_count
from fsdp_dp.models.config import GPTConfig, HuggingFaceConfig, ModelConfig, ResNetConfig
from fsdp_dp.models.objective import IGNORED, row_losses
from tests.oracle import clipped_sum, norm, row_gradients

RESNET = ResNetConfig(channels=2, image_size=8, classes=3, stages=2, width=4, groups=2)
GPT = GPTConfig(layers=1, heads=2, width=8, mlp_width=12, block_size=6, vocabulary_size=11)
BERT = HuggingFaceConfig(
    head="text_classes", model_type="bert", block_size=6, classes=3, options={
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 11,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
)  # fmt: skip
PADDED = tokens_one_per_document([[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [2], [3, 3, 5, 1, 8]], 7)
IMAGES = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 1])
CASES = {
    "resnet": (RESNET, (IMAGES, LABELS)),
    "documents of different lengths": (GPT, split_row(PADDED)),
    "texts of different lengths": (BERT, (PADDED[:, :6].long(), LABELS)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_clipped_as_the_oracle_does(name: str) -> None:
    """Seen to fail for documents when a row's loss is divided by the number of labels in the batch."""
    config, rows = CASES[name]
    if isinstance(config, HuggingFaceConfig):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = build(config).double()
    gradients = list(row_gradients(model, rows, row_losses))
    bound = sorted(map(norm, gradients))[1] * 1.01  # clips half of the rows
    expected = clipped_sum(iter(gradients), bound)
    privacy = PrivacyConfig(
        max_grad_norm=bound, noise_multiplier=0.0, expected_batch_size=4, dataset_size=100, target_delta=1e-5,
        sampling="external_poisson",
    )  # fmt: skip
    engine = make_private(model, privacy)
    row_losses(model(rows[0]), rows[1]).mean().backward()
    engine.privatize()
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(4 * parameter.grad, expected[parameter_name], rtol=1e-6, atol=1e-9)


def test_a_documents_loss_is_its_own_and_padding_counts_zero() -> None:
    inputs, targets = split_row(PADDED)
    assert inputs.min() >= 0 and (targets == IGNORED).sum(1).tolist() == [4, 0, 6, 2]
    torch.manual_seed(0)
    model = build(GPT)
    together = row_losses(model(inputs), targets)
    alone = torch.cat([row_losses(model(inputs[i : i + 1]), targets[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone)
    assert together[2] == 0  # one token predicts nothing
    dataset = RowDataset(PADDED)
    assert torch.equal(dataset.batch(torch.tensor([3, 0]))[1], targets[[3, 0]])


def test_padding_changes_nothing_of_what_bert_sees() -> None:
    pytest.importorskip("transformers")
    model, short = build(BERT).eval(), torch.tensor([[4, 5, 6]])
    longer = torch.cat([short, torch.full((1, 3), IGNORED)], 1)
    torch.testing.assert_close(model(longer), model(short))


@pytest.mark.parametrize(("config", "count"), [(RESNET, 1339), (BERT, 5379)])
def test_parameters_are_counted_without_loading_them(config: ModelConfig, count: int) -> None:
    if isinstance(config, HuggingFaceConfig):
        pytest.importorskip("transformers")
    assert parameter_count(config) == sum(p.numel() for p in build(config).parameters()) == count


def test_weights_are_float32_whatever_they_were_saved_in(tmp_path: Path) -> None:
    """Seen to fail when the type of the file is kept: small updates would be lost in bfloat16."""
    transformers = pytest.importorskip("transformers")
    small = {"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 11, "bos_token_id": 1, "eos_token_id": 1}
    saved = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).to(torch.bfloat16)
    saved.save_pretrained(str(tmp_path))
    model = build(HuggingFaceConfig(pretrained=str(tmp_path)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.training


def test_blocks_are_the_outermost_of_a_list() -> None:
    pytest.importorskip("transformers")
    assert [type(block).__name__ for block in build(BERT).blocks] == ["BertLayer"] * 2  # type: ignore[union-attr]
    assert len(build(RESNET).blocks) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ResNetConfig, {"groups": 5}, "model.width must be a multiple of model.groups=5, found 32"),
        (ResNetConfig, {"image_size": 2}, "model.stages=3 halve an image 2 times, which model.image_size=2"),
        (ResNetConfig, {"classes": 1}, "model.classes must be an integer of at least 2"),
        (HuggingFaceConfig, {}, "Exactly one of model.pretrained"),
        (HuggingFaceConfig, {"model_type": "gpt2", "head": "poetry"}, "model.head must be one of 'language'"),
        (HuggingFaceConfig, {"model_type": "gpt2", "lora_alpha": 2.0}, "need model.lora_rank"),
    ],
)
def test_bad_options_are_named(kind: type[ModelConfig], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "gtp2"}, "model.model_type=gtp2.*transformers refuses"),
        ({"pretrained": "./nowhere"}, r"model.pretrained=./nowhere: could not be loaded .*hf download"),
        (
            {"model_type": "gpt2", "lora_rank": 2, "lora_targets": ["q_proj"]},
            "model.lora_targets=.*layers end in: c_attn",
        ),
    ],
)
def test_what_transformers_refuses_is_said(options: dict, message: str) -> None:
    pytest.importorskip("peft")
    small = {"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 11} if options.get("model_type") == "gpt2" else {}
    with pytest.raises(ValueError, match=message):
        build(HuggingFaceConfig(**{"options": small, **options}))
