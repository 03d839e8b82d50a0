"""The recipes of conf/experiment: each is what it says, and its program takes a private step, made small by overrides.

The data is on the disk, as people without a network have it: a folder of `save_to_disk` with weights and a tokenizer in
folders (GPT-2), lines of JSON (BERT, Llama), folders of images (ViT).
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fsdp_dp import train
from fsdp_dp.accounting import calibrate_noise_multiplier
from fsdp_dp.training.schema import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
SMALL_BATCH = ["device=cpu", "steps=2", "batch_size=8", "microbatch_size=4", "privacy.target_delta=1e-4"]
NO_HUB = ["data.name=null", "data.subset=null", "data.held_out_split=null", "data.tokenizer=null"]


def composed(recipe: str, *overrides: str, world_size: int = 1) -> TrainConfig:
    train.store_schema()
    with initialize_config_dir(version_base="1.3", config_dir=train.config_folder()):
        return train.checked(compose("config", [f"experiment={recipe}", *overrides]), world_size)


def text(recipe: str) -> str:
    return (ROOT / "conf" / "experiment" / f"{recipe}.yaml").read_text()


def test_each_recipe_states_its_epsilon():
    for recipe in RECIPES:
        config, stated = composed(recipe, world_size=2), text(recipe)
        epsilon, delta = re.findall(r"# Expected: epsilon (\S+) at delta ([^\s;,]+)", stated)[0]
        assert (config.privacy.target_epsilon, config.privacy.target_delta) == (float(epsilon), float(delta)), recipe
        assert re.search(r"# Expected: .*(held-out .* \(|not measured)", stated), recipe
        for rows, sigma in re.findall(r"\(([\d ]+) rows: noise multiplier ([\d.]+)\)", stated):
            found = calibrate_noise_multiplier(
                target_epsilon=float(epsilon),
                sample_rate=config.batch_size / int(rows.replace(" ", "")),
                steps=config.steps,
                delta=float(delta),
            )
            assert found == pytest.approx(float(sigma), abs=6e-4), recipe


def test_help_names_each_recipe_and_the_options_that_matter_first():
    """Of all commands that read the configuration. Seen to fail when a recipe is left out of the help's list."""
    started = {
        command: subprocess.Popen(
            [sys.executable, "-m", f"fsdp_dp.{command}", "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for command in ("train", "check", "plan", "audit", "report")
    }
    pages = {command: process.communicate(timeout=150)[0] for command, process in started.items()}
    ten = pages["train"].split("Ten options")[1].split("Recipes")[0]
    assert len(re.findall(r"^ +[\w.]+=", ten, re.MULTILINE)) == 10
    for recipe in RECIPES:
        assert re.search(rf"^ +{recipe} +\w", pages["train"], re.MULTILINE), recipe
    for command, page in pages.items():
        assert len(page.splitlines()) > 8, command
        assert f"fsdp_dp.{command}" in page
        before_groups = page.split("Choose one of each group")[0]
        assert command in ("train", "report") or f"{command}." in before_groups or "model=" in before_groups


# ----------------------------------------------------------------------------------------------------- small versions


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Texts with labels as lines of JSON, and the same as a folder of `save_to_disk` with two splits."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("reviews")
    rows = [{"text": f"film {i} was {'good' if i % 2 else 'bad'}, " * (1 + i % 5), "label": i % 2} for i in range(60)]
    lines = folder / "reviews.jsonl"
    lines.write_text("".join(json.dumps({"sentence": row["text"], "label": row["label"]}) + "\n" for row in rows))
    split = {"train": datasets.Dataset.from_list(rows[:40]), "test": datasets.Dataset.from_list(rows[40:])}
    datasets.DatasetDict(split).save_to_disk(str(folder / "saved"))
    return {"lines": str(lines), "saved": str(folder / "saved")}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small GPT-2 and a tokenizer, each in a folder as `save_pretrained` leaves it."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["film was good", "film was bad"], vocab_size=280, special_tokens=["<end>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<end>")
    fast.save_pretrained(str(folder / "tokenizer"))
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 280}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(str(folder / "weights"))
    return {"tokenizer": str(folder / "tokenizer"), "weights": str(folder / "weights")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of PNG files for each of two classes."""
    pytest.importorskip("datasets")
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for number in range(30):
        place = folder / ("light" if number % 2 else "dark")
        place.mkdir(exist_ok=True)
        Image.new("RGB", (10, 8), (number * 8, 100, 200 if number % 2 else 20)).save(place / f"{number}.png")
    return str(folder)


def take_two_steps(config: TrainConfig, folder: Path) -> tuple[str, list[dict]]:
    """A run of two releases in this process: its report, and what it recorded."""
    app = importlib.import_module("fsdp_dp.training.app")
    assert app.run(app.prepare(config)) == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 2]
    report = (folder / "report.md").read_text()
    assert "2 of 2" in report
    return report, records


def test_gpt2_with_lora_from_weights_on_the_disk(reviews, gpt2, tmp_path):
    config = composed(
        "gpt2_finetune_lora", *SMALL_BATCH, "data.name=null", f"data.path={reviews['saved']}",
        f"data.tokenizer={gpt2['tokenizer']}", f"model.pretrained={gpt2['weights']}", "model.block_size=16",
        "model.lora_rank=2", f"output_dir={tmp_path}",
    )  # fmt: skip
    report, records = take_two_steps(config, tmp_path)
    assert "one document (its first 17 tokens" in report
    assert f"The pretrained weights ({gpt2['weights']}): public" in report and "The tokenizer" in report
    assert "LoRA of rank 2; 256 trainable parameters" in report  # 2 layers x (16 x 2 + 2 x 48)
    assert "held_out_bits_per_token" in records[-1]["outside_the_guarantee"]


def test_bert_of_random_weights(reviews, tmp_path):
    small = "{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 20}"
    config = composed(
        "bert_sst2", *SMALL_BATCH, *NO_HUB, f"data.path={reviews['lines']}", "model.pretrained=null", "model.model_type=bert",
        f"model.options={small}", "model.block_size=24", f"output_dir={tmp_path}",
    )  # fmt: skip
    report, records = take_two_steps(config, tmp_path)
    assert "one text with its label (its first 24 bytes" in report
    assert 0 <= records[-1]["outside_the_guarantee"]["held_out_accuracy"] <= 1


def test_vit_of_random_weights_on_a_folder_of_pictures(pictures, tmp_path):
    small = "{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 20, patch_size: 4}"
    config = composed(
        "vit_cifar10", *SMALL_BATCH, "data.name=null", "data.held_out_split=null", f"data.path={pictures}",
        "model.pretrained=null", "model.model_type=vit", f"model.options={small}", "model.image_size=8", "model.classes=2",
        f"output_dir={tmp_path}",
    )  # fmt: skip
    report, _ = take_two_steps(config, tmp_path)
    assert "one image with its label" in report and "8x8" not in report


def test_resnet_of_cifar10_on_a_folder_of_pictures(pictures, tmp_path):
    small = ["model.image_size=8", "model.classes=2", "model.stages=2", "model.width=8"]
    where = ["data.name=null", "data.held_out_split=null", f"data.path={pictures}", f"output_dir={tmp_path}"]
    report, records = take_two_steps(composed("dp_zero_cifar10", *SMALL_BATCH, *small, *where), tmp_path)
    assert "one image with its label" in report
    assert 0 <= records[-1]["outside_the_guarantee"]["held_out_accuracy"] <= 1


def test_dp_zero_recipes_with_zero1_and_with_files_of_torchvision():
    assert composed("dp_zero_digits", "sharding=zero1", world_size=2).sharding.strategy == "zero1"
    files = ["data=torchvision", "data.name=CIFAR10", "data.path=data"]
    assert composed("dp_zero_cifar10", *files).data.source == "torchvision"


def test_digits_without_diagnostics(tmp_path):
    """Seen to fail when the training score is written all the same."""
    pytest.importorskip("sklearn")
    config = composed("resnet_digits", *SMALL_BATCH, "batch_size=64", "diagnostics=false", f"output_dir={tmp_path}")
    app = importlib.import_module("fsdp_dp.training.app")
    assert app.run(app.prepare(config)) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["outside_the_guarantee"] for record in records] == [{}, {}]
    report = (tmp_path / "report.md").read_text()
    assert "diagnostics=false" in report and "accuracy" not in report and "padding" not in report


@pytest.mark.parametrize(
    ("recipe", "sharding"), [("llama_7b_hsdp", "hybrid_shard_fsdp2"), ("gpt2_finetune_lora", "full_shard")]
)
def test_on_two_ranks(recipe, sharding, reviews, tmp_path):
    """HSDP's two copies; and LoRA beside frozen weights in FSDP1, where a rank may hold none of what is trained.

    Seen to fail (ranks waited for each other) when each rank asks its own optimizer alone whether there is a state to save.
    """
    shape = {
        "llama_7b_hsdp": ["model.layers=2", "model.width=16", "model.heads=2", "model.mlp_width=20"],
        "gpt2_finetune_lora": [
            "model.pretrained=null", "model.model_type=gpt2",
            "model.options={n_layer: 2, n_head: 2, n_embd: 16, vocab_size: 256}",
        ],
    }[recipe]  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fsdp_dp.train",
        f"experiment={recipe}", f"sharding={sharding}", *SMALL_BATCH, *NO_HUB, *shape, f"data.path={reviews['lines']}",
        "model.block_size=16", f"output_dir={tmp_path}/run",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "epsilon cross-checked" in done.stdout
    dcp_to_torch_save(tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "whole.pt")
    saved = torch.load(tmp_path / "whole.pt", weights_only=False)["optimizer"]
    assert {float(value) for name, value in saved.items() if name.endswith(".step")} == {2.0}
