"""Text to rows: the same on every rank, held out by file, each byte in one row."""

import math
from pathlib import Path

import pytest
import torch

from fsdp_dp.data.config import DataConfig
from fsdp_dp.data.corpus import load_corpus
from fsdp_dp.data.documents import Document, is_utf8, split_documents, unigram_bits
from fsdp_dp.data.packing import PADDING, RowDataset, one_per_document, pack
from fsdp_dp.data.python_source import EXCLUDED, python_source
from fsdp_dp.data.rows import name_fraction
from fsdp_dp.data.text_files import fixed_folder, text_files
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.objective import IGNORED


def documents(count: int) -> list[Document]:
    return [Document(name=f"folder/file_{i}.txt", text=f"text number {i}, ".encode() * 20) for i in range(count)]


def names(some: list[Document]) -> set[str]:
    return {document.name for document in some}


def test_split_is_disjoint_complete_and_about_the_fraction():
    train, held_out = split_documents(documents(500), 0.2)
    assert names(train) | names(held_out) == names(documents(500))
    assert not names(train) & names(held_out)
    assert 60 <= len(held_out) <= 140


def test_another_file_moves_no_file_to_the_other_side():
    _, before = split_documents(documents(200), 0.2)
    _, after = split_documents(documents(201), 0.2)
    assert names(before) == names(after) - {"folder/file_200.txt"}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_empty(fraction):
    train, held_out = split_documents(documents(3), fraction)
    assert train and held_out


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match=r"data: found 1 document.*at least 2"):
        split_documents(documents(1), 0.1)


def test_name_fraction_is_fixed():
    """A literal value: a changed hash would move files between training and held-out text."""
    assert name_fraction("os.py") == pytest.approx(0.943812766417913)


def test_packed_rows_are_the_text_cut_up():
    some = documents(7)
    rows = pack(some, 33)
    text = b"".join(document.text for document in some)
    assert bytes(rows.flatten().tolist()) == text[: rows.numel()]
    assert rows.shape == (len(text) // 33, 33)


def test_too_little_text_gives_no_rows():
    assert pack([Document(name="a", text=b"short")], 33).shape == (0, 33)


def test_inputs_and_targets_are_the_row_shifted_by_one():
    dataset = RowDataset(pack(documents(7), 33))
    inputs, targets = dataset[2]
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (32,)
    assert torch.equal(inputs[1:], targets[:-1])
    assert torch.equal(inputs, dataset.rows[2, :-1].long())
    assert len(dataset) == len(dataset.rows)


def test_one_row_per_document_pads_and_ignores_the_padding():
    some = [Document(name="long", text=b"x" * 50), Document(name="short", text=b"abc")]
    rows = one_per_document(some, 9)
    assert rows.shape == (2, 9)
    inputs, targets = RowDataset(rows)[1]
    assert inputs.tolist() == [*b"abc", *[PADDING] * 5]
    assert targets.tolist() == [*b"bc", *[IGNORED] * 6]
    assert IGNORED not in RowDataset(rows)[0][1]


def test_padding_is_no_utf8():
    assert not is_utf8(bytes([PADDING]))
    assert is_utf8("naïve ε".encode())


def test_python_source_is_the_library_and_nothing_installed():
    some = python_source()
    found = names(some)
    assert {"os.py", "json/decoder.py"} <= found
    assert not any(EXCLUDED & set(name.split("/")) for name in found)
    assert sum(len(document.text) for document in some) > 5_000_000
    assert [document.name for document in some] == sorted(found)


def test_default_corpus_is_deterministic_and_splits_by_file():
    first, second = (
        load_corpus(DataConfig(), GPTConfig(block_size=128)),
        load_corpus(DataConfig(), GPTConfig(block_size=128)),
    )
    assert torch.equal(first.train.rows, second.train.rows)
    assert torch.equal(first.held_out.rows, second.held_out.rows)
    assert 0.03 < len(first.held_out) / len(first.train) < 0.3
    assert 4.3 < first.baseline < 5.1
    assert "one packed row of 129 bytes" in first.unit


def write_files(folder: Path, count: int) -> None:
    for document in documents(count):
        path = folder / document.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document.text)


def test_text_files_are_named_relative_to_the_fixed_folder(tmp_path):
    write_files(tmp_path, 5)
    some = text_files(f"{tmp_path}/**/*.txt")
    assert names(some) == {f"folder/file_{i}.txt" for i in range(5)}
    assert fixed_folder("a/b/**/*.txt") == Path("a/b")
    assert fixed_folder("*.txt") == Path()
    assert fixed_folder("/a/b.txt") == Path("/a")


def test_moving_a_corpus_keeps_its_split(tmp_path):
    corpora = []
    for place in ("here", "elsewhere"):
        write_files(tmp_path / place, 30)
        corpora.append(
            load_corpus(DataConfig(source="text_files", path=f"{tmp_path}/{place}/**/*.txt"), GPTConfig(block_size=16))
        )
    assert torch.equal(corpora[0].held_out.rows, corpora[1].held_out.rows)


def test_documents_as_rows_state_their_unit(tmp_path):
    write_files(tmp_path, 30)
    config = DataConfig(source="text_files", path=f"{tmp_path}/**/*.txt", rows="one_per_document")
    corpus = load_corpus(config, GPTConfig(block_size=16))
    assert len(corpus.train) + len(corpus.held_out) == 30
    assert "one document" in corpus.unit


def test_missing_path_names_the_option(tmp_path):
    with pytest.raises(ValueError, match=r"data.path: no file matches .*nothing"):
        text_files(f"{tmp_path}/nothing/*.txt")


def test_other_encodings_are_refused_by_file(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"data.path: .*latin.txt is not UTF-8"):
        text_files(f"{tmp_path}/*.txt")


def test_text_shorter_than_a_row_says_so(tmp_path):
    write_files(tmp_path, 3)
    with pytest.raises(ValueError, match="shorter than one row of 100001 bytes"):
        load_corpus(DataConfig(source="text_files", path=f"{tmp_path}/**/*.txt"), GPTConfig(block_size=100_000))


def test_unigram_entropy_of_known_texts():
    assert unigram_bits([b"ab", b"cd"]) == 2.0
    assert unigram_bits([b"aaab"]) == pytest.approx(2 - 0.75 * math.log2(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "data.source must be one of 'python_source', 'text_files', 'hf_text'"),
        ({"rows": "sentences"}, "data.rows must be one of 'packed', 'one_per_document'"),
        ({"held_out_fraction": 1.0}, "data.held_out_fraction must be"),
        ({"source": "text_files"}, "data.path is not set"),
        ({"path": "*.txt"}, "data.path='.*' is not read by data=python_source: add data=text_files"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
