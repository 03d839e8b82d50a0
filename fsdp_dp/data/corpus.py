"""From the configuration to training and held-out rows: read, divided, cut into rows, and looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fsdp_dp.data import hugging_face
from fsdp_dp.data.config import DataConfig, check_fit
from fsdp_dp.data.documents import Document, split_documents, unigram_bits
from fsdp_dp.data.images import digits, torchvision_sets
from fsdp_dp.data.packing import RowDataset, one_per_document, pack, pack_tokens, tokens_one_per_document
from fsdp_dp.data.python_source import python_source
from fsdp_dp.data.rows import LabelledRows, Rows
from fsdp_dp.data.text_files import text_files
from fsdp_dp.models.build import vocabulary_size
from fsdp_dp.models.config import (
    IMAGE_CLASSES,
    LANGUAGE,
    TEXT_CLASSES,
    ImageModel,
    ModelConfig,
    ResNetConfig,
    TextModel,
)
from fsdp_dp.models.objective import ACCURACY, BITS_PER_BYTE, BITS_PER_TOKEN, Score


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and held-out rows, how a model is scored on them, and what one row is, in words.

    `baseline` is the held-out score of a model that knows only how common each byte, token or class is.
    """

    train: Rows
    held_out: Rows
    score: Score
    baseline: float
    unit: str


def load_corpus(config: DataConfig, model: ModelConfig) -> Corpus:
    """Read the data that `config` names, as rows for `model`; the result depends on the files alone, so every rank builds
    the same.

    Raises:
        ValueError: a missing or unreadable path, too few rows, labels that the model has no class for, rows of another kind
            than the model's; the message names the option.
    """
    check_fit(config, model)
    corpus = language(config, model) if model.task == LANGUAGE else classes(config, model)
    for side, rows in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(rows) == 0:
            size = f" of {row_length(model)} bytes or tokens" if model.task == LANGUAGE else ""
            raise ValueError(
                f"data: the {side} text is shorter than one row{size}; add text, or lower model.block_size"
                if size
                else f"data: the {side} part is empty; add data"
            )
    return corpus


def language(config: DataConfig, model: ModelConfig) -> Corpus:
    """Text of which every byte or token is predicted."""
    train, held_out = documents(config)
    length = row_length(model)
    if config.tokenizer is None:
        to_rows = {"packed": pack, "one_per_document": one_per_document}[config.rows]
        rows = [to_rows(side, length) for side in (train, held_out)]
        baseline = unigram_bits(document.text for document in held_out)
    else:
        sides = [tokenized(side, config.tokenizer) for side in (train, held_out)]
        of_tokens = {"packed": pack_tokens, "one_per_document": tokens_one_per_document}[config.rows]
        rows = [of_tokens(side, length) for side in sides]
        baseline = unigram_bits(sides[1])
    check_vocabulary(rows, model)
    return Corpus(
        train=RowDataset(rows[0]),
        held_out=RowDataset(rows[1]),
        score=BITS_PER_BYTE if config.tokenizer is None else BITS_PER_TOKEN,
        baseline=baseline,
        unit=describe_unit(config, model),
    )


def documents(config: DataConfig) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents."""
    if config.source == "hf_text":
        train, held_out = hugging_face.text_documents(config)
        return split_documents(train, config.held_out_fraction) if held_out is None else (train, held_out)
    whole = text_files(config.path) if config.path else python_source()
    return split_documents(whole, config.held_out_fraction)


def tokenized(side: list[Document], name: str) -> list[list[int]]:
    """The documents' tokens, each with the token that ends a text, where the tokenizer has one."""
    tokenizer = hugging_face.load_tokenizer(name)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = tokenizer([document.text.decode() for document in side], add_special_tokens=False)["input_ids"]
    return [ids + end for ids in tokens]


def row_length(model: ModelConfig) -> int:
    """Bytes or tokens of a row of language, of which the last `block_size` are predicted."""
    assert isinstance(model, TextModel)
    return model.block_size + 1


def check_vocabulary(rows: Sequence[Tensor], model: ModelConfig) -> None:
    """Raise ValueError for a token that the model has no embedding of."""
    known, largest = vocabulary_size(model), max((int(side.max()) for side in rows if len(side)), default=0)
    if largest >= known:
        raise ValueError(
            f"data: token ids go up to {largest}, but the model knows 0 to {known - 1}: take the tokenizer that belongs to "
            "it, or raise its vocabulary (model.vocabulary_size, or model.options.vocab_size)."
        )


def classes(config: DataConfig, model: ModelConfig) -> Corpus:
    """Texts or images with one label each."""
    assert isinstance(model, ImageModel)
    train, held_out = labelled(config, model)
    in_training, in_held_out = train.count_labels(), held_out.count_labels()
    check_labels(in_training + in_held_out, in_training, model.classes)
    if model.task == TEXT_CLASSES:
        check_vocabulary([train.inputs, held_out.inputs], model)
    return Corpus(
        train=train,
        held_out=held_out,
        score=ACCURACY,
        baseline=max(in_held_out.values()) / len(held_out),
        unit=describe_unit(config, model),
    )


def labelled(config: DataConfig, model: ImageModel) -> tuple[LabelledRows, LabelledRows]:
    if config.source == "digits":
        return digits(config, model)
    if config.source == "torchvision":
        return torchvision_sets(config, model)
    if isinstance(model, ResNetConfig) or model.task == IMAGE_CLASSES:
        return hugging_face.labelled_images(config, model)
    return hugging_face.labelled_texts(config, model)


def check_labels(counts: Counter[int], in_training: Counter[int], classes: int) -> None:
    """Raise ValueError for labels that are no class of the model, and where there is nothing to tell apart."""
    if min(counts) < 0 or max(counts) >= classes:
        raise ValueError(
            f"data: labels go from {min(counts)} to {max(counts)}, but model.classes={classes} knows 0 to {classes - 1}: "
            f"{'set model.classes, or ' if min(counts) >= 0 else 'rows without a label must be left out; '}"
            "choose another data.label_column or split."
        )
    if len(in_training) < 2:
        raise ValueError(
            f"data: every training row has the label {min(in_training, default=None)}; expected at least two classes. Is "
            "data.label_column the right one, and is the data of this split complete?"
        )


def describe_unit(config: DataConfig, model: ModelConfig) -> str:
    """What adding or removing one row adds or removes."""
    if model.task == IMAGE_CLASSES:
        return "one image with its label"
    length = row_length(model) - 1
    pieces = "bytes" if config.tokenizer is None else "tokens"
    if model.task == TEXT_CLASSES:
        return f"one text with its label (its first {length} {pieces}; the rest of it is not used)"
    if config.rows == "one_per_document":
        return f"one document (its first {length + 1} {pieces}; the rest of it is not used)"
    return (
        f"one packed row of {length + 1} {pieces}; a document longer than that spans several rows, and is then protected "
        "row by row, not as a whole"
    )
