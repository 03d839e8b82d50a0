"""A corpus that every machine has: the standard library's sources of the running Python (about 11 MB, no download)."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from fsdp_dp.data.documents import Document, is_utf8

# Some distributions ship these and some do not, and what is installed beside the library is not the library.
EXCLUDED = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})


def python_source() -> list[Document]:
    """The library's `.py` files, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    documents = [
        Document(name=name, text=(root / name).read_bytes())
        for name in names
        if not EXCLUDED.intersection(name.split("/"))
    ]
    return [document for document in documents if document.text and is_utf8(document.text)]
