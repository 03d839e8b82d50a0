"""From the configuration to training and held-out rows: read, split by file, cut into rows."""

from __future__ import annotations

from dataclasses import dataclass

from fsdp_dp.data.config import DataConfig
from fsdp_dp.data.documents import split_documents, unigram_bits_per_byte
from fsdp_dp.data.packing import RowDataset, one_per_document, pack
from fsdp_dp.data.python_source import python_source
from fsdp_dp.data.text_files import text_files


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and held-out rows, the byte-unigram entropy of the held-out text, and what one row is, in words."""

    train: RowDataset
    held_out: RowDataset
    held_out_unigram_bits: float
    unit: str


def load_corpus(config: DataConfig, block_size: int) -> Corpus:
    """Read the text that `config` names; the result depends on the files alone, so every rank builds the same.

    Raises:
        ValueError: a missing or unreadable path, too few documents or too little text; the message names the option.
    """
    documents = text_files(config.path) if config.path else python_source()
    train, held_out = split_documents(documents, config.held_out_fraction)
    to_rows = {"packed": pack, "one_per_document": one_per_document}[config.rows]
    corpus = Corpus(
        train=RowDataset(to_rows(train, block_size + 1)),
        held_out=RowDataset(to_rows(held_out, block_size + 1)),
        held_out_unigram_bits=unigram_bits_per_byte(document.text for document in held_out),
        unit=describe_unit(config.rows, block_size + 1),
    )
    for side, rows in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(rows) == 0:
            raise ValueError(
                f"data: the {side} text is shorter than one row of {block_size + 1} bytes; "
                "add text, or lower model.block_size"
            )
    return corpus


def describe_unit(rows: str, row_bytes: int) -> str:
    """What adding or removing one row adds or removes."""
    if rows == "one_per_document":
        return f"one document (its first {row_bytes} bytes; the rest of it is not used)"
    return (
        f"one packed row of {row_bytes} bytes; a document longer than that spans several rows, and is then protected "
        "row by row, not as a whole"
    )
