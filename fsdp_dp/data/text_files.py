"""Any UTF-8 files by glob, as documents named relative to the glob's fixed folder."""

from __future__ import annotations

import glob
import itertools
from pathlib import Path

from fsdp_dp.data.documents import Document, is_utf8


def text_files(pattern: str) -> list[Document]:
    """The files that match, sorted by name; empty files are left out.

    Raises:
        ValueError: nothing matches, or a file is not UTF-8; the message names `data.path` and the file.
    """
    matches = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not matches:
        raise ValueError(
            f"data.path: no file matches {pattern!r} (seen from {Path.cwd()}); "
            "expected a glob of UTF-8 files, such as data.path='corpus/**/*.txt'"
        )
    root = fixed_folder(pattern)
    documents = []
    for path in matches:
        text = Path(path).read_bytes()
        if not is_utf8(text):
            raise ValueError(f"data.path: {path} is not UTF-8; convert it, or narrow the glob {pattern!r}")
        if text:
            documents.append(Document(name=Path(path).relative_to(root).as_posix(), text=text))
    return documents


def fixed_folder(pattern: str) -> Path:
    """The folders of the pattern before its first wildcard, so that moving a corpus does not change its split."""
    folders = Path(pattern).parts[:-1]
    return Path(*itertools.takewhile(lambda folder: not glob.has_magic(folder), folders))
