"""Text for pretraining: documents to bytes to packed sequences. `shardcomp.SampleStream` says which of them belong to which step.

A token is a byte (0 … 255), so no tokenizer is needed and any vocabulary of 256 or more will do. Everything is a function of
the text, the length and the seed: no topology, no process and no run changes a sample or its place.
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
"""Stands after every document. Text holds no zero byte; one that a file has nevertheless separates as well."""

LIMIT = 16 * 2**20
"""Bytes of text that are read of the standard library, which keeps start-up to a second or two."""

PIECE = 16 * 2**10
"""A file given by name is cut, at ends of lines, into documents of about this many bytes, so that one file can be split."""


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
    return [piece for path in paths for piece in cut(path.read_bytes())]


def cut(text: bytes) -> list[bytes]:
    """`text` in pieces of at least `PIECE` bytes (the last may be shorter), each ending where a line ends."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find(b"\n", start + PIECE - 1)
        end = len(text) if end < 0 else end + 1
        pieces.append(text[start:end])
        start = end
    return pieces


def in_fixed_order(documents: Iterable[bytes]) -> list[bytes]:
    """The distinct documents that are not empty, mixed by a hash of what they say: folders and file names do not matter."""
    return sorted({document for document in documents if document}, key=lambda document: hashlib.sha256(document).digest())


def build(documents: Iterable[bytes], length: int, held_out: float = 0.05) -> Corpus:
    """Split by document, then pack: no document has a part in both. `held_out` is the share of the bytes that is kept back,
    to which at least one document goes."""
    ordered = in_fixed_order(documents)
    wanted = held_out * sum(map(len, ordered))
    kept, total = 0, 0
    while kept < len(ordered) and total < max(wanted, 1):
        total += len(ordered[kept])
        kept += 1
    digest = hashlib.sha256(SEPARATOR.join(ordered)).hexdigest()
    return Corpus(train=pack(ordered[kept:], length), held_out=pack(ordered[:kept], length), fingerprint=f"{digest}/{length}")


def pack(documents: Sequence[bytes], length: int) -> Tensor:
    """The documents, each followed by a separator, as rows of `length` tokens without padding: `uint8[n, length]`. What is
    left at the end and fills no row is dropped."""
    stream = b"".join(document + SEPARATOR for document in documents)
    rows = len(stream) // length
    if rows == 0:
        return torch.empty(0, length, dtype=torch.uint8)
    return torch.frombuffer(bytearray(stream[: rows * length]), dtype=torch.uint8).view(rows, length)
