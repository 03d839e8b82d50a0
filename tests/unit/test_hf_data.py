"""Data by way of `datasets`, scikit-learn and torchvision: files of one's own, and what is said where something is wrong."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fsdp_dp.data.config import DataConfig
from fsdp_dp.data.corpus import Corpus, load_corpus
from fsdp_dp.models.config import GPTConfig, HuggingFaceConfig, ResNetConfig
from fsdp_dp.models.objective import IGNORED

TEXT = HuggingFaceConfig(head="text_classes", model_type="bert", block_size=8, options={"vocab_size": 256})
LANGUAGE = GPTConfig(block_size=8)
IMAGES = ResNetConfig(image_size=6, classes=2, stages=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("transformers")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def lines(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def reviews(count: int = 40) -> list[dict[str, Any]]:
    return [{"text": f"number {i} is {'even' if i % 2 == 0 else 'odd'}", "label": i % 2} for i in range(count)]


def texts(path: str, model: Any = TEXT, **options: Any) -> Corpus:
    return load_corpus(DataConfig(source="hf_text", path=path, **options), model)


def pictures(folder: Path, count: int = 12, classes: int = 2) -> str:
    from PIL import Image

    for number in range(count):
        place = folder / "pictures" / f"class {number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (number * 20, 0, 255)).save(place / f"{number}.png")
    return str(folder / "pictures")


def test_texts_and_their_labels_from_lines_of_json(tmp_path: Path) -> None:
    corpus = texts(lines(tmp_path, reviews()))
    assert len(corpus.train) + len(corpus.held_out) == 40 and 0 < len(corpus.held_out) < 20
    inputs, label = corpus.train[0]
    assert inputs.shape == (8,) and inputs.dtype == torch.int64
    assert bytes(inputs.tolist()).decode().startswith("number") and label in (0, 1)
    assert corpus.unit == "one text with its label (its first 8 bytes; the rest of it is not used)"
    assert 0.5 <= corpus.baseline <= 1 and corpus.score.name == "accuracy"


def test_adding_a_row_moves_no_other(tmp_path: Path) -> None:
    """Rows are divided by what is in them. Seen to fail when they are divided by their number."""
    held_out, whole = [], replace(TEXT, block_size=32)
    for number, rows in enumerate((reviews(), [{"text": "one more", "label": 0}, *reviews()])):
        corpus = texts(lines(tmp_path, rows, f"{number}.jsonl"), whole)
        held_out.append({bytes(corpus.held_out[i][0].clamp(min=0).tolist()) for i in range(len(corpus.held_out))})
    assert held_out[0] <= held_out[1] and len(held_out[1] - held_out[0]) <= 1


def test_a_folder_of_files_is_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "mine" / "more").mkdir(parents=True)
    lines(tmp_path / "mine", reviews()[:10])
    lines(tmp_path / "mine" / "more", reviews()[10:])
    corpus = texts(str(tmp_path / "mine"))
    assert len(corpus.train) + len(corpus.held_out) == 40


@pytest.mark.parametrize("suffix", ["csv", "txt", "parquet"])
def test_other_kinds_of_files(tmp_path: Path, suffix: str) -> None:
    import datasets

    rows = datasets.Dataset.from_list(reviews(30))
    path = str(tmp_path / f"rows.{suffix}")
    if suffix == "txt":
        Path(path).write_text("\n".join(rows["text"]))
    else:
        getattr(rows, f"to_{suffix}")(path)
    corpus = texts(path, LANGUAGE, rows="one_per_document")
    assert len(corpus.train) + len(corpus.held_out) == 30
    assert corpus.unit.startswith("one document (its first 9 bytes")


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    import datasets

    parts = {"train": datasets.Dataset.from_list(reviews(9)), "test": datasets.Dataset.from_list(reviews(4))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    corpus = texts(str(tmp_path / "saved"), held_out_split="test")
    assert (len(corpus.train), len(corpus.held_out)) == (9, 4)
    with pytest.raises(ValueError, match=r"data.held_out_split=dev: the data has no such split, only train, test"):
        texts(str(tmp_path / "saved"), held_out_split="dev")


def test_names_of_classes(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": "good" if i % 3 else "bad"} for i in range(12)]
    path = lines(tmp_path, rows)
    with pytest.raises(ValueError, match=r"data.class_names=None does not name bad, good: name all classes"):
        texts(path)
    with pytest.raises(ValueError, match=r"does not name good"):
        texts(path, class_names=["bad"])
    corpus = texts(path, class_names=["bad", "good"])
    assert {int(corpus.train[i][1]) for i in range(len(corpus.train))} == {0, 1}


def test_an_empty_text_is_a_row_that_attends_to_something(tmp_path: Path) -> None:
    corpus = texts(lines(tmp_path, [{"text": "", "label": 0}, *reviews()]), held_out_fraction=0.01)
    rows = [corpus.train[i][0] for i in range(len(corpus.train))]
    assert all(row[0] >= 0 for row in rows) and sum(bool((row[1:] == IGNORED).all()) for row in rows) <= 1


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(source="hf_image", path=pictures(tmp_path)), IMAGES)
    image, _ = corpus.train[0]
    assert image.shape == (3, 6, 6) and image.dtype == torch.float32 and image.abs().max() <= 1
    assert image[2].min() == 1 and image[1].max() == -1  # blue, no green
    assert len(corpus.train) + len(corpus.held_out) == 12 and corpus.unit == "one image with its label"
    grey = load_corpus(DataConfig(source="hf_image", path=pictures(tmp_path)), ResNetConfig(channels=1, stages=1))
    assert grey.train[0][0].shape == (1, 32, 32)


def test_digits_as_large_as_the_model_wants() -> None:
    pytest.importorskip("sklearn")
    corpus = load_corpus(DataConfig(source="digits"), ResNetConfig(channels=3, image_size=12))
    assert len(corpus.train) + len(corpus.held_out) == 1797
    image, label = corpus.train[5]
    assert image.shape == (3, 12, 12) and -1 <= image.min() < image.max() <= 1 and 0 <= label < 10
    inputs, labels = corpus.held_out.batch(torch.arange(4))
    assert inputs.shape == (4, 3, 12, 12) and labels.shape == (4,)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"data.path=.*rows.jsonl: could not be read: \w+|is empty"),
        ([{"text": "a", "label": 0}], {}, "found 1 document"),
        ([{"text": f"{i}", "label": 1} for i in range(9)], {}, "every training row has the label 1; expected at least two"),
        ([{"text": f"{i}", "label": i} for i in range(9)], {}, "labels go from 0 to 8, but model.classes=2 knows 0 to 1"),
        ([{"text": f"{i}", "label": -1} for i in range(9)], {}, "rows without a label must be left out"),
        ([{"text": f"{i}", "label": 0.5} for i in range(9)], {}, "expected a whole number in every row, found 0.5"),
        ([{"text": f"{i}"} for i in range(9)], {}, "data.label_column: .* none of the usual columns label, labels, but text"),
        ([{"body": f"{i}", "label": 1} for i in range(9)], {}, "data.input_column: .* none of the usual columns text"),
        (reviews(), {"input_column": "txet"}, "data.input_column: the data has no column txet, but text, label"),
        (reviews(), {"input_column": "label"}, "data.input_column=label: expected text in every row, found 0"),
        (reviews(), {"tokenizer": "./nowhere"}, "data.tokenizer=./nowhere: could not be loaded"),
        (reviews(), {"held_out_split": "test"}, "data.held_out_split=test: the data has no such split, only train"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_rows_is_said(rows: list, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        texts(lines(tmp_path, rows), **options)


def test_what_is_wrong_with_files_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.path=.*nothing.* names 0 files; expected a glob, or a folder, of files of one kind"
    ):
        texts(str(tmp_path / "nothing" / "*.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"names 0 files"):
        texts(str(tmp_path / "empty"))
    (tmp_path / "mixed.csv").write_text("text,label\na,0\n")
    (tmp_path / "mixed.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"names 2 files of kinds csv, json"):
        texts(str(tmp_path / "mixed.*"))
    (tmp_path / "broken.jsonl").write_text("{'no': json")
    with pytest.raises(ValueError, match=r"data.path=.*broken.jsonl: could not be read: "):
        texts(str(tmp_path / "broken.jsonl"))
    for source, expected in (("empty", "fewer than two folders"), ("nowhere", "is no folder")):
        with pytest.raises(ValueError, match=expected):
            load_corpus(DataConfig(source="hf_image", path=str(tmp_path / source)), IMAGES)
    with pytest.raises(ValueError, match="fewer than two folders"):
        load_corpus(DataConfig(source="hf_image", path=pictures(tmp_path, classes=1)), IMAGES)


def test_a_vocabulary_that_is_too_small_is_said(tmp_path: Path) -> None:
    small = HuggingFaceConfig(head="text_classes", model_type="bert", block_size=8, options={"vocab_size": 50})
    with pytest.raises(ValueError, match=r"token ids go up to 1\d\d, but the model knows 0 to 49"):
        texts(lines(tmp_path, reviews()), small)
    with pytest.raises(ValueError, match=r"model.block_size must be at most the model's 512 positions, found 600"):
        texts(lines(tmp_path, reviews()), HuggingFaceConfig(head="text_classes", model_type="bert", block_size=600))


def test_the_hub_without_a_network_says_what_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"data.name=nobody/nothing.*save_to_disk\('FOLDER'\).*data.path=FOLDER"):
        load_corpus(DataConfig(source="hf_text", name="nobody/nothing"), TEXT)


def test_torchvision_is_asked_for_by_name() -> None:
    """Where it is not installed, or built for another torch, that is what is said."""
    config = DataConfig(source="torchvision", name="CIFAR10", path="/nowhere")
    installed = importlib.util.find_spec("torchvision") is not None
    missing, empty = "needs the package torchvision", "data.path=/nowhere: torchvision finds no CIFAR10 there"
    with pytest.raises(ValueError, match=f"{missing}|{empty}" if installed else missing):
        load_corpus(config, ResNetConfig())


def test_torchvision_reads_what_is_there(tmp_path: Path) -> None:
    """MNIST's own files, with a few images in them."""
    reason = "torchvision is not installed, or does not import beside this torch"
    pytest.importorskip("torchvision", exc_type=Exception, reason=reason)  # type: ignore[arg-type]
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        images, labels = bytes([255] * 28 * 28 * count), bytes(i % 2 for i in range(count))
        header = (0x0803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes((0x0801).to_bytes(4, "big") + count.to_bytes(4, "big") + labels)
    config = DataConfig(source="torchvision", name="MNIST", path=str(tmp_path))
    corpus = load_corpus(config, ResNetConfig(channels=1, image_size=14, classes=2))
    assert (len(corpus.train), len(corpus.held_out)) == (6, 4)
    assert torch.equal(corpus.train[1][0], torch.ones(1, 14, 14)) and corpus.train[1][1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "hf_text"}, "data=hf_text needs exactly one of data.name .on the Hub. and data.path"),
        ({"source": "hf_image", "name": "a", "path": "b"}, "exactly one of data.name"),
        ({"source": "torchvision", "name": "CIFAR10"}, "data=torchvision needs data.name.*and data.path"),
        (
            {"source": "hf_text", "path": "x", "held_out_split": "train"},
            "data.held_out_split=train is the split that is",
        ),
        ({"source": "digits", "path": "x"}, "data.path='x' is not read by data=digits"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_rows_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data=digits gives rows for image_classes.*is for language: choose data="):
        load_corpus(DataConfig(source="digits"), LANGUAGE)
