"""Text for pretraining: from documents to bytes to packed sequences. `shardcomp.SampleStream` says which belong to which step.

A token is a byte (0 … 255). So no tokenizer is needed, and every vocabulary of 256 or more will do. The samples depend only on
the text, the length and the seed: they are the same on every topology and in every run.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
SEPARATOR = b"\0"
"""Follows every document. Text has no zero bytes. If a file has one, it separates as well."""

LIMIT = 16 * 2**20
"""How many bytes of the standard library are read, at most, so that start-up takes a second or two."""

DOCUMENT = 16 * 2**10
"""A text file is cut at ends of lines into documents of about this many bytes, so that even one file has held-out text."""


@dataclass(frozen=True)
class Corpus:
    """Packed sequences, `uint8[n, length]` each, and a fingerprint that is equal on two ranks only if their text is."""

    train: Tensor
    held_out: Tensor
    fingerprint: str


def standard_library() -> list[bytes]:
    """The Python sources of the standard library on this machine, one document a file, `LIMIT` bytes at most."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    paths = sorted(path for path in root.rglob("*.py") if not installed & set(path.relative_to(root).parts))
    documents, total = [], 0
    for document in in_fixed_order(path.read_bytes() for path in paths):
        if total + len(document) > LIMIT:
            break
        documents.append(document)
        total += len(document)
    return documents


def read(paths: Iterable[Path]) -> list[bytes]:
    """The documents of the named text files. Raises OSError where one cannot be read."""
    return [document for path in paths for document in cut(path.read_bytes())]


def cut(text: bytes) -> list[bytes]:
    """`text` in documents of at least `DOCUMENT` bytes. Each ends where a line ends; the last may be shorter."""
    documents, start = [], 0
    while start < len(text):
        end = text.find(b"\n", start + DOCUMENT - 1)
        end = len(text) if end < 0 else end + 1
        documents.append(text[start:end])
        start = end
    return documents


def in_fixed_order(documents: Iterable[bytes]) -> list[bytes]:
    """The distinct documents that are not empty, ordered by their hash: folders and file names do not matter."""
    return sorted({document for document in documents if document}, key=lambda document: hashlib.sha256(document).digest())


def build(documents: Iterable[bytes], length: int, held_out: float = 0.05) -> Corpus:
    """Split the documents into training and held-out ones, then pack both.

    Args:
        documents: bytes of text, in any order.
        length: tokens of a sequence.
        held_out: the share of all bytes that is held out, at least one document.
    """
    ordered = in_fixed_order(documents)
    target = held_out * sum(map(len, ordered))
    count, total = 0, 0
    while count < len(ordered) and total < max(target, 1):
        total += len(ordered[count])
        count += 1
    digest = hashlib.sha256(SEPARATOR.join(ordered)).hexdigest()
    return Corpus(train=pack(ordered[count:], length), held_out=pack(ordered[:count], length), fingerprint=f"{digest}/{length}")


def pack(documents: Sequence[bytes], length: int) -> Tensor:
    """The documents, each followed by a separator, as rows of `length` tokens without padding: `uint8[n, length]`. A remainder
    that does not fill a row is dropped."""
    stream = b"".join(document + SEPARATOR for document in documents)
    rows = len(stream) // length
    if rows == 0:
        return torch.empty(0, length, dtype=torch.uint8)
    return torch.frombuffer(bytearray(stream[: rows * length]), dtype=torch.uint8).view(rows, length)
