"""Text and images by way of the package `datasets`: from the Hub, or from files of one's own, which needs no network.

Without a split of its own, a part of the rows is held out by a hash of what is in them, so that adding or removing one row
moves no other from one side to the other.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsdp_dp.data.config import DataConfig
from fsdp_dp.data.documents import Document
from fsdp_dp.data.images import INSTALL, ImageReader
from fsdp_dp.data.packing import tokens_one_per_document
from fsdp_dp.data.rows import LabelledRows, fingerprint, held_out_names
from fsdp_dp.models.config import ImageModel, TextModel

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
TEXT_COLUMNS = ("text", "sentence", "document", "content")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
SHOWN = 8
UTF8 = ("utf-8", "replace")


def text_documents(config: DataConfig) -> tuple[list[Document], list[Document] | None]:
    """(training, held-out) documents, one a row that is not empty, named by what is in it; None without a held-out split."""
    train, held_out = parts(config)
    return documents_of(train, config), None if held_out is None else documents_of(held_out, config)


def documents_of(part: Any, config: DataConfig) -> list[Document]:
    texts = [text.encode(*UTF8) for text in texts_of(part, config) if text]
    if not texts:
        raise ValueError(
            f"data: all {len(part)} rows of column '{input_column(part, config, TEXT_COLUMNS)}' are empty."
        )
    return [Document(name=fingerprint(text), text=text) for text in texts]


def labelled_texts(config: DataConfig, model: TextModel) -> tuple[LabelledRows, LabelledRows]:
    """Texts cut to `model.block_size` tokens, with their labels; negative tokens are padding."""
    encode = tokens_of(config)
    sides = []
    for part in parts(config):
        if part is not None:
            texts = texts_of(part, config)
            tokens = tokens_one_per_document(encode(texts, model.block_size), model.block_size)
            tokens[:, 0].clamp_(min=0)  # an empty text
            sides.append(Side(tokens, labels_of(part, config), texts))
    return divided(sides, config, torch.Tensor.long, lambda text: text.encode(*UTF8))


def labelled_images(config: DataConfig, model: ImageModel) -> tuple[LabelledRows, LabelledRows]:
    """Images, decoded when they are read, with their labels."""
    sides, found = [], parts(config)
    from datasets import Image

    for part in found:
        if part is not None:
            column = input_column(part, config, IMAGE_COLUMNS)
            if not isinstance(part.features[column], Image):
                raise ValueError(
                    f"data.input_column={column} holds no images, found {part.features[column]}: name the column that does, "
                    f"of {', '.join(part.column_names)}."
                )
            encoded = _Column(part.cast_column(column, Image(decode=False)), column)
            sides.append(Side(encoded, labels_of(part, config), encoded))
    reader, decoder = ImageReader(model.channels, model.image_size), Image()
    return divided(sides, config, lambda encoded: reader(decoder.decode_example(encoded)), _file)


def _file(encoded: dict[str, Any]) -> bytes:
    return encoded["bytes"] or Path(encoded["path"]).read_bytes()


class Side(NamedTuple):
    """The rows of a split: inputs, labels, and what rows are recognised by."""

    inputs: Any
    labels: list[int]
    contents: Any


def divided(
    sides: Sequence[Side], config: DataConfig, read: Callable[[Any], Tensor], as_bytes: Callable[[Any], bytes]
) -> tuple[LabelledRows, LabelledRows]:
    """Training and held-out rows: of two splits, or of one, by what is in a row."""
    if len(sides) == 2:
        train, test = (LabelledRows(inputs, labels, range(len(labels)), read) for inputs, labels, _ in sides)
        return train, test
    ((inputs, labels, contents),) = sides
    names = [fingerprint(as_bytes(contents[number])) for number in range(len(labels))]
    held_out = held_out_names(names, config.held_out_fraction)
    train, test = (
        LabelledRows(inputs, labels, [number for number, name in enumerate(names) if (name in held_out) is side], read)
        for side in (False, True)
    )
    return train, test


class _Column:
    """One column, read row by row."""

    def __init__(self, part: Any, column: str) -> None:
        self.part, self.column = part, column

    def __getitem__(self, number: int) -> Any:
        return self.part[number][self.column]


# ------------------------------------------------------------------------------------------------------ what is where


def parts(config: DataConfig) -> tuple[Any, Any | None]:
    """The splits that are asked for, as `datasets.Dataset`; the second is None where `data.held_out_split` is."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data={config.source} needs the package datasets: {INSTALL}") from error
    datasets.disable_progress_bars()
    found = from_hub(config) if config.path is None else from_files(config, config.path)
    if isinstance(found, datasets.Dataset):
        found = {config.split: found}
    wanted = [config.split, *([] if config.held_out_split is None else [config.held_out_split])]
    for option, name in zip(("split", "held_out_split"), wanted, strict=False):
        if name not in found:
            raise ValueError(
                f"data.{option}={name}: the data has no such split, only {', '.join(found)}"
                + (". data.held_out_split=null holds out a part of the rows" if option == "held_out_split" else "")
            )
        if len(found[name]) == 0:
            raise ValueError(f"data.{option}={name} is empty.")
    return found[config.split], None if config.held_out_split is None else found[config.held_out_split]


def from_hub(config: DataConfig) -> Any:
    """The data set `data.name`, from the Hub or the cache of an earlier download."""
    import datasets

    try:
        return datasets.load_dataset(config.name, config.subset)
    except Exception as error:  # of many kinds: no network, no such name, no such subset
        raise ValueError(
            f"data.name={config.name}, data.subset={config.subset}: could not be loaded ({type(error).__name__}: "
            f'{_first_line(error)}). Without a network: where there is one, python -c "from datasets import load_dataset; '
            f"load_dataset({config.name!r}, {config.subset!r}).save_to_disk('FOLDER')\"; copy FOLDER, and give "
            "data.name=null data.subset=null data.path=FOLDER"
        ) from error


def from_files(config: DataConfig, path: str) -> Any:
    """What is at `path`: a folder of `save_to_disk`, a folder of images, or files that a glob names."""
    import datasets

    folder = Path(path)
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(path)
        if config.source == "hf_image":
            return images_of(folder)
        pattern = str(folder / "**" / "*") if folder.is_dir() else path
        files = [file for file in sorted(glob.glob(pattern, recursive=True)) if Path(file).is_file()]
        kinds = {READERS.get(Path(file).suffix, Path(file).suffix) for file in files}
        if len(kinds) != 1 or not kinds <= set(READERS.values()):
            raise ValueError(
                f"data.path={path} (seen from {Path.cwd()}) names {len(files)} files"
                + (f" of kinds {', '.join(sorted(kinds))}" if files else "")
                + f"; expected a glob, or a folder, of files of one kind, {', '.join(READERS)}, or what "
                "datasets' save_to_disk leaves"
            )
        return datasets.load_dataset(kinds.pop(), data_files=files, split="train")
    except ValueError:
        raise
    except Exception as error:  # datasets wraps what went wrong in errors of its own
        raise ValueError(f"data.path={path}: could not be read: {_first_line(error.__cause__ or error)}") from error


def images_of(folder: Path) -> Any:
    """A folder with a folder of images for each class."""
    import datasets

    if not folder.is_dir():
        raise ValueError(
            f"data.path={folder} (seen from {Path.cwd()}) is no folder; expected one with a folder of images for each "
            "class, or one of datasets.save_to_disk"
        )
    if sum(entry.is_dir() and any(entry.iterdir()) for entry in folder.iterdir()) < 2:
        raise ValueError(f"data.path={folder} holds fewer than two folders with images; expected one for each class")
    return datasets.load_dataset("imagefolder", data_dir=str(folder))


# ------------------------------------------------------------------------------------------------------------ columns


def input_column(part: Any, config: DataConfig, usual: Sequence[str]) -> str:
    return _column(part, "data.input_column", config.input_column, usual)


def texts_of(part: Any, config: DataConfig) -> list[str]:
    column = input_column(part, config, TEXT_COLUMNS)
    texts = list(part[column])
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"data.input_column={column}: expected text in every row, found {wrong!r:.60}.")
    return texts


def labels_of(part: Any, config: DataConfig) -> list[int]:
    """Class numbers; text is looked up in `data.class_names`, so that the numbers do not depend on the rows."""
    column = _column(part, "data.label_column", config.label_column, LABEL_COLUMNS)
    labels = list(part[column])
    if any(isinstance(label, str) for label in labels):
        numbers = {name: number for number, name in enumerate(config.class_names or [])}
        unknown = sorted({str(label) for label in labels} - numbers.keys())
        if unknown:
            more = ", ..." if len(unknown) > SHOWN else ""
            raise ValueError(
                f"data.label_column={column} holds text, of which data.class_names={config.class_names} does not name "
                f"{', '.join(unknown[:SHOWN])}{more}: name all classes, for example data.class_names=[negative,positive]."
            )
        return [numbers[label] for label in labels]
    wrong = next((label for label in labels if not isinstance(label, int)), None)
    if None in labels or wrong is not None:
        raise ValueError(f"data.label_column={column}: expected a whole number in every row, found {wrong}.")
    return labels


def _column(part: Any, option: str, asked: str | None, usual: Sequence[str]) -> str:
    found = [name for name in ([asked] if asked is not None else usual) if name in part.column_names]
    if not found:
        wanted = f"no column {asked}" if asked is not None else f"none of the usual columns {', '.join(usual)}"
        raise ValueError(f"{option}: the data has {wanted}, but {', '.join(part.column_names)}: name one of these.")
    return found[0]


# ------------------------------------------------------------------------------------------------------------- tokens


def tokens_of(config: DataConfig) -> Callable[[list[str], int], list[list[int]]]:
    """From texts, and a length to cut them to, to token ids as a classifier wants them: of `data.tokenizer`, or bytes."""
    if config.tokenizer is None:
        return lambda texts, length: [list(text.encode(*UTF8)[:length]) for text in texts]
    tokenizer = load_tokenizer(config.tokenizer)
    return lambda texts, length: tokenizer(texts, truncation=True, max_length=length)["input_ids"]  # type: ignore[no-any-return]


def load_tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError("data.tokenizer needs the package transformers: pip install 'fsdp-dp[hf]'") from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"data.tokenizer={name}: could not be loaded ({_first_line(error)}). It must be a name on the Hub, which needs a "
            "network or an earlier download, or a folder of save_pretrained; data.tokenizer=null takes bytes"
        ) from error


def _first_line(error: BaseException) -> str:
    """Of what an error says, or its kind where it says nothing (an empty file's)."""
    return str(error).strip().split("\n")[0] or type(error).__name__
