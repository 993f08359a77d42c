"""Text -> token windows, split by document so that none straddles training and validation."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}


class DataError(ValueError):
    """Text that cannot be used: empty, binary, too short."""


@dataclass(frozen=True)
class Windows:
    """Token windows of one split.

    Attributes:
        tokens: [num_windows, seq_len], int64; each window starts with BOS, as every prompt does when served.
        documents: number of documents they come from.
    """

    tokens: torch.Tensor
    documents: int

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()


def read_documents(source: str, field: str = "text", max_documents: int | None = None) -> Iterator[str]:
    """Documents of a file or of a Hugging Face dataset.

    Args:
        source: `.txt` (documents separated by blank lines), `.jsonl` (one a line, in `field`), each also as
            `.xz` or `.gz`; or, where no such file exists, a dataset id `ORG/NAME[:CONFIG[:SPLIT]]` (split
            `train` unless named).
        field: key of the text in a JSON line or dataset row.
        max_documents: stop after so many.

    Raises:
        DataError: missing, empty or binary file, JSON lines without the field.
    """
    count = 0
    for text in _read(source, field):
        if text.strip():
            yield text
            count += 1
            if count == max_documents:
                return
    if not count:
        raise DataError(f"{source} is empty: expected text, found no document.")


def _read(source: str, field: str) -> Iterator[str]:
    path = Path(source)
    if not path.exists():
        yield from _read_hub(source, field)
        return
    if not path.is_file():
        raise DataError(f"{source} is not a file. Name .txt or .jsonl files (also .xz, .gz), one by one.")
    opener = _OPENERS.get(path.suffix, open)
    kind = Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix
    if kind not in (".txt", ".jsonl"):
        raise DataError(
            f"{source}: expected a name ending in .txt or .jsonl (also .xz, .gz), found {path.name!r}."
        )
    try:
        with opener(path, "rt", encoding="utf-8") as f:
            yield from _read_jsonl(f, source, field) if kind == ".jsonl" else _read_txt(f, source)
    except (UnicodeDecodeError, lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(
            f"{source} is not UTF-8 text ({type(e).__name__}: {e}). Convert it, or name another file."
        ) from e


def _read_txt(lines: Iterable[str], source: str) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if "\0" in line:
            raise DataError(f"{source} is binary: found a NUL character. Name a text file.")
        if line.strip():
            document.append(line)
        elif document:
            yield "".join(document)
            document = []
    if document:
        yield "".join(document)


def _read_jsonl(lines: Iterable[str], source: str, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{source}, line {number}: not JSON ({e}).") from e
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            keys = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{source}, line {number}: expected a text in {field!r}, found {keys}. Name it with --field."
            )
        yield row[field]


def _read_hub(source: str, field: str) -> Iterator[str]:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    if (
        name.count("/") > 1
        or name.startswith((".", "/", "~"))
        or Path(name).suffix in (".txt", ".jsonl", ".xz", ".gz")
    ):
        raise DataError(f"No such file: {source}")
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise DataError(
            f"No such file: {source}. To read it as a Hugging Face dataset: pip install 'vllm-dejavu[eval]'"
        ) from e
    try:
        rows: Iterable[Any] = load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as e:  # the hub's client raises many kinds; all mean the same to the user
        raise DataError(
            f"{source}: no such file, and no dataset of that id could be opened ({type(e).__name__}: {e})."
        ) from e
    for row in rows:
        if not isinstance(row.get(field), str):
            raise DataError(
                f"Dataset {name}: expected a text in {field!r}, found {sorted(row)}. Name it with --field."
            )
        yield row[field]


def split_documents(documents: list[Any], valid_share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Training and validation documents, by a seeded permutation; at least one of each.

    Raises:
        DataError: fewer than 2 documents.
    """
    if len(documents) < 2:
        raise DataError(
            f"Expected at least 2 documents to split into training and validation, found {len(documents)}. In"
            " .txt files blank lines separate documents; or name separate text with --valid-data."
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    count = min(max(1, round(valid_share * len(documents))), len(documents) - 1)
    valid = {int(i) for i in order[:count]}
    return [d for i, d in enumerate(documents) if i not in valid], [documents[i] for i in sorted(valid)]


def tokenize(documents: Iterable[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each document, without special tokens."""
    documents = list(documents)
    out: list[list[int]] = []
    for start in range(0, len(documents), 256):
        batch = tokenizer(documents[start : start + 256], add_special_tokens=False, verbose=False)
        out.extend(batch["input_ids"])
    return out


def pack(
    documents: Iterable[list[int]], seq_len: int, bos: int, *, max_tokens: int | None, seed: int | None
) -> Windows:
    """Join documents (BOS between them) and cut the stream into windows [BOS, seq_len - 1 tokens].

    Args:
        max_tokens: keep at most so many tokens, drawn from the whole text.
        seed: of that draw; None keeps the first windows in order.

    Raises:
        DataError: less text than one window.
    """
    documents = list(documents)
    stream = (
        np.concatenate([np.asarray([bos, *d], dtype=np.int64) for d in documents])
        if documents
        else np.zeros(0, np.int64)
    )
    stream = stream[1:]  # the first window brings its own BOS
    count = len(stream) // (seq_len - 1)
    if not count:
        raise DataError(
            f"Expected at least {seq_len - 1} tokens of text (one sequence), found {len(stream)}. Give more"
            " text or a smaller --seq-len."
        )
    body = stream[: count * (seq_len - 1)].reshape(count, seq_len - 1)
    if max_tokens is not None and count * seq_len > max_tokens:
        keep = max(1, max_tokens // seq_len)
        chosen = (
            np.arange(keep)
            if seed is None
            else np.sort(np.random.default_rng(seed).permutation(count)[:keep])
        )
        body = body[chosen]
    tokens = np.concatenate([np.full((len(body), 1), bos, np.int64), body], axis=1)
    return Windows(torch.from_numpy(tokens), len(documents))


@torch.inference_mode()
def sample_from_model(
    model: Any, num_tokens: int, seq_len: int, bos: int, seed: int, progress: Any = None
) -> list[list[int]]:
    """Documents the model writes itself (temperature 1, from BOS): text for users who have none.

    Args:
        model: a transformers causal LM. progress: a tqdm-like bar counting tokens, or None.

    Returns:
        Token ids of each document, without BOS, at most seq_len - 1 each.
    """
    torch.manual_seed(seed)
    eos = model.config.eos_token_id
    documents: list[list[int]] = []
    # All at once where it fits: a step costs little more for more rows.
    batch = max(1, min(64, -(-num_tokens // (seq_len - 1))))
    empty = 0
    while sum(map(len, documents)) < num_tokens:
        prompt = torch.full((batch, 1), bos, dtype=torch.long, device=model.device)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_length=seq_len,
            pad_token_id=model.config.pad_token_id or 0,
        )
        for row in out[:, 1:].tolist():
            end = row.index(eos) if eos in row else len(row)
            if end:
                documents.append(row[:end])
        empty = 0 if any(len(row) > 1 and row[1] != eos for row in out.tolist()) else empty + 1
        if empty == 8:
            raise DataError(
                f"The model ended {8 * batch} texts at their first token: it cannot write its own text. Name"
                " files with --data."
            )
        if progress is not None:
            progress.update(min(num_tokens, sum(map(len, documents))) - progress.n)
    return documents
