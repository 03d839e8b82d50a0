"""Which text to train on and how it becomes rows, apart from the code that reads it (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from fsdp_dp.config import require_choice, require_number

SOURCES = ("python_source", "text_files")
ROWS = ("packed", "one_per_document")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A text and its division into rows; the row is what differential privacy protects.

    Args:
        source: `python_source` (the standard library of the running Python) or `text_files`.
        path: glob of UTF-8 files, for `text_files` ("corpus/**/*.txt").
        rows: `packed` (the text cut into rows: a long document spans many) or `one_per_document` (each document's first
            bytes, padded: the whole of a document's influence is protected).
        held_out_fraction: share of the files kept from training, chosen by a hash of their names.

    Raises:
        ValueError: a value is out of its range; the message names the option as `data.<field>`.
    """

    source: str = "python_source"
    path: str | None = None
    rows: str = "packed"
    held_out_fraction: float = 0.1

    def __post_init__(self) -> None:
        require_choice("data.source", self.source, SOURCES)
        require_choice("data.rows", self.rows, ROWS)
        require_number("data.held_out_fraction", self.held_out_fraction, above=0.0, below=1.0)
        if self.source == "text_files" and not self.path:
            raise ValueError("data.path is not set: data=text_files needs a glob, such as data.path='corpus/**/*.txt'.")
        if self.source != "text_files" and self.path:
            raise ValueError(f"data.path={self.path!r} is read by data=text_files only: add data=text_files.")
