"""Text -> windows: formats, splits, and every kind of bad file."""

import gzip
import json
import lzma

import pytest
import torch

from vllm_dejavu.predictor_training import data

TEXTS = ["First document.\nIts second line.\n", "Second one.\n", "Third.\n"]


def write(path, payload: bytes):
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wb") as f:
        f.write(payload)
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_txt_documents_are_separated_by_blank_lines(tmp_path, suffix):
    source = write(tmp_path / f"a.txt{suffix}", "\n\n".join(TEXTS).encode())
    assert [d.strip() for d in data.read_documents(source)] == [t.strip() for t in TEXTS]


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_jsonl_has_one_document_a_line(tmp_path, suffix):
    source = write(tmp_path / f"a.jsonl{suffix}", "\n".join(json.dumps({"body": t}) for t in TEXTS).encode())
    assert list(data.read_documents(source, "body")) == TEXTS
    assert list(data.read_documents(source, "body", max_documents=2)) == TEXTS[:2]


@pytest.mark.parametrize(
    ("name", "payload", "message"),
    [
        pytest.param("a.txt", b"", "empty", id="empty"),
        pytest.param("a.txt", b" \n\n \n", "empty", id="only-blanks"),
        pytest.param("a.txt", bytes(range(256)), "not UTF-8", id="binary"),
        pytest.param("a.txt", b"abc\0def\n", "binary", id="nul"),
        pytest.param("a.jsonl", b"", "empty", id="empty-jsonl"),
        pytest.param("a.jsonl", b"not json\n", "line 1: not JSON", id="not-json"),
        pytest.param("a.jsonl", b'{"other": 1}\n', "--field", id="no-field"),
        pytest.param("a.jsonl", b'"text"\n', "--field", id="not-an-object"),
        pytest.param("a.csv", b"x\n", ".txt or .jsonl", id="suffix"),
    ],
)
def test_bad_files_are_named(tmp_path, name, payload, message):
    source = write(tmp_path / name, payload)
    with pytest.raises(data.DataError, match=message) as e:
        list(data.read_documents(source))
    assert source in str(e.value)


@pytest.mark.parametrize("name", ["a.txt.xz", "a.txt.gz"])
def test_truncated_or_fake_archives_are_named(tmp_path, name):
    path = tmp_path / name
    write(path, b"text\n" * 1000)
    whole = path.read_bytes()
    for payload in (whole[: len(whole) // 2], b"no archive at all"):
        path.write_bytes(payload)
        with pytest.raises(data.DataError, match="not UTF-8 text"):
            list(data.read_documents(str(path)))


@pytest.mark.parametrize("source", ["missing.txt", "/no/such/file.jsonl", "./a/b/c"])
def test_missing_file(source):
    with pytest.raises(data.DataError, match="No such file"):
        list(data.read_documents(source))


def test_directory_is_refused(tmp_path):
    with pytest.raises(data.DataError, match="not a file"):
        list(data.read_documents(str(tmp_path)))


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_split_keeps_documents_whole_and_apart(count):
    documents = [[i] * 5 for i in range(count)]
    train, valid = data.split_documents(documents, 0.1, seed=3)
    assert train and valid and sorted(train + valid) == documents
    assert data.split_documents(documents, 0.1, seed=3) == (train, valid)


def test_one_document_cannot_be_split():
    with pytest.raises(data.DataError, match="--valid-data"):
        data.split_documents(["only"], 0.1, 0)


def test_windows_start_with_bos_and_keep_the_text_in_order():
    windows = data.pack([[10, 11, 12], [20, 21], [30, 31, 32]], 4, bos=2, max_tokens=None, seed=None)
    assert windows.tokens.tolist() == [[2, 10, 11, 12], [2, 2, 20, 21], [2, 2, 30, 31]]
    assert windows.documents == 3 and windows.num_tokens == 12


def test_limit_draws_from_the_whole_text_by_seed():
    documents = [list(range(100, 1100))]
    draw = [data.pack(documents, 11, 2, max_tokens=110, seed=s).tokens for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert draw[0].shape == (10, 11) and int(draw[0][:, 1:].max()) > 600
    first = data.pack(documents, 11, 2, max_tokens=110, seed=None).tokens
    assert first[:, 1:].flatten().tolist() == list(range(100, 200))


@pytest.mark.parametrize("documents", [[], [[5, 6]]], ids=["nothing", "two-tokens"])
def test_text_shorter_than_one_sequence(documents):
    with pytest.raises(data.DataError, match="one sequence"):
        data.pack(documents, 16, 2, max_tokens=None, seed=0)
