"""Which data to train on and how it becomes rows, apart from the code that reads it (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from fsdp_dp.config import require_choice, require_number
from fsdp_dp.models.config import IMAGE_CLASSES, LANGUAGE, TEXT_CLASSES, ModelConfig

# What rows each source can give (`ModelConfig.task`).
SOURCES = {
    "python_source": (LANGUAGE,),
    "text_files": (LANGUAGE,),
    "hf_text": (LANGUAGE, TEXT_CLASSES),
    "hf_image": (IMAGE_CLASSES,),
    "torchvision": (IMAGE_CLASSES,),
    "digits": (IMAGE_CLASSES,),
}
HUB = ("hf_text", "hf_image")
ROWS = ("packed", "one_per_document")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data and its division into rows; the row is what differential privacy protects.

    Args:
        source: `python_source` (the standard library of the running Python), `text_files`, `hf_text` or `hf_image`
            (`datasets`: from the Hub by `name`, or files by `path`), `torchvision` (by `name`, in the folder `path`) or
            `digits` (1797 small images that come with scikit-learn).
        path: `text_files`: a glob of UTF-8 files ("corpus/**/*.txt"). `hf_text`: a folder of `save_to_disk`, or a glob
            or folder of json, jsonl, csv, parquet or txt files, one row a record or line. `hf_image`: a folder of
            `save_to_disk`, or one with a folder of images for each class. `torchvision`: the folder of the data set.
        name: on the Hub, or a class of torchvision.datasets.
        subset: of a data set on the Hub that has several.
        split, held_out_split: which parts to train and to evaluate on; without the latter, a share of the rows is held out.
        input_column, label_column: null takes the usual names.
        class_names: of labels that are text, in the order of their numbers.
        tokenizer: of `hf_text`: a name on the Hub or a folder; null takes the bytes of UTF-8.
        rows: of language: `packed` (the text cut into rows: a long document spans many) or `one_per_document` (each
            document's beginning, padded: the whole of a document's influence is protected).
        held_out_fraction: share kept from training, chosen by a hash of a file's name or of a row itself.

    Raises:
        ValueError: a value is out of its range; the message names the option as `data.<field>`.
    """

    source: str = "python_source"
    path: str | None = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    held_out_split: str | None = None
    input_column: str | None = None
    label_column: str | None = None
    class_names: list[str] | None = None
    tokenizer: str | None = None
    rows: str = "packed"
    held_out_fraction: float = 0.1

    def __post_init__(self) -> None:
        require_choice("data.source", self.source, tuple(SOURCES))
        require_choice("data.rows", self.rows, ROWS)
        require_number("data.held_out_fraction", self.held_out_fraction, above=0.0, below=1.0)
        if self.held_out_split == self.split:
            raise ValueError(
                f"data.held_out_split={self.split} is the split that is trained on: name another, or null to hold out a part."
            )
        if self.source == "text_files" and not self.path:
            raise ValueError("data.path is not set: data=text_files needs a glob, such as data.path='corpus/**/*.txt'.")
        if self.source in ("python_source", "digits") and self.path:
            raise ValueError(
                f"data.path={self.path!r} is not read by data={self.source}: add data=text_files, hf_text or hf_image."
            )
        if self.source in HUB and (self.path is None) == (self.name is None):
            raise ValueError(
                f"data={self.source} needs exactly one of data.name (on the Hub) and data.path (your files), found "
                f"{self.name} and {self.path}: for example data.name=null data.path='corpus/*.jsonl'."
            )
        if self.source == "torchvision" and not (self.name and self.path):
            raise ValueError(
                "data=torchvision needs data.name, a class of torchvision.datasets, and data.path, the folder that it is "
                f"in, found {self.name} and {self.path}: for example data.name=CIFAR10 data.path=data."
            )


def check_fit(data: DataConfig, model: ModelConfig) -> None:
    """Raise ValueError where the data has no rows as the model needs them."""
    if model.task in SOURCES[data.source]:
        return
    fitting = ", ".join(source for source, tasks in SOURCES.items() if model.task in tasks)
    raise ValueError(
        f"data={data.source} gives rows for {' or '.join(SOURCES[data.source])}, but this model "
        f"({model.in_words}) is for {model.task}: choose data={fitting.replace(', ', ' or ')}, or another model."
    )
