"""The pretraining text: what is packed, what is held out, and that a sample's place depends on nothing but the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data

texts = st.lists(st.binary(min_size=0, max_size=40), max_size=20)


def documents(count: int, size: int = 100) -> list[bytes]:
    return [f"document {index} ".encode().ljust(size, b"x") for index in range(count)]


def test_packing_joins_documents_with_a_separator_and_drops_the_rest() -> None:
    packed = data.pack([b"abc", b"de", b"fgh"], 4)
    assert packed.dtype == torch.uint8
    assert [bytes(row.tolist()) for row in packed] == [b"abc\0", b"de\0f"]


@given(texts, st.integers(2, 16))
def test_packing_keeps_every_byte_but_the_last_incomplete_row(given: list[bytes], length: int) -> None:
    stream = b"".join(document + b"\0" for document in given)
    packed = data.pack(given, length)
    assert packed.shape == (len(stream) // length, length)
    assert bytes(packed.flatten().tolist()) == stream[: packed.numel()]


@given(st.binary(max_size=200))
def test_cutting_loses_nothing_and_ends_pieces_where_lines_end(text: bytes) -> None:
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(data, "DOCUMENT", 16)
        pieces = data.cut(text)
    assert b"".join(pieces) == text
    assert all(len(piece) >= 16 and piece.endswith(b"\n") for piece in pieces[:-1])


def test_no_document_is_in_both_parts() -> None:
    whole = [f"doc{index:04}".encode() for index in range(40)]  # 8 bytes with the separator: a row each
    corpus = data.build(whole, 8)
    train = {bytes(row.tolist()) for row in corpus.train}
    held_out = {bytes(row.tolist()) for row in corpus.held_out}
    assert held_out and not train & held_out
    assert train | held_out == {document + b"\0" for document in whole}


def test_a_document_that_occurs_twice_is_not_held_out_and_trained_on() -> None:
    twice = data.build(documents(20) * 2, 101)
    once = data.build(documents(20), 101)
    assert torch.equal(twice.train, once.train) and torch.equal(twice.held_out, once.held_out)


def test_the_held_out_share_is_of_the_bytes() -> None:
    corpus = data.build(documents(1000), 101, held_out=0.1)
    assert len(corpus.held_out) == 100 and len(corpus.train) == 900


def test_the_corpus_depends_on_what_the_documents_say_and_not_on_their_order() -> None:
    forward, backward = data.build(documents(30), 50), data.build(documents(30)[::-1], 50)
    assert torch.equal(forward.train, backward.train) and forward.fingerprint == backward.fingerprint
    assert data.build([*documents(29), b"other"], 50).fingerprint != forward.fingerprint
    assert data.build(documents(30), 51).fingerprint != forward.fingerprint


def test_a_corpus_of_nothing_is_empty_and_no_crash() -> None:
    corpus = data.build([], 8)
    assert corpus.train.shape == corpus.held_out.shape == (0, 8)


def test_named_files_are_read_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"line\n" * 10_000)
    (tmp_path / "b.txt").write_bytes(b"short")
    pieces = data.read([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert len(pieces) > 2 and b"".join(pieces) == b"line\n" * 10_000 + b"short"


def test_the_standard_library_is_python_source_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LIMIT", 200_000)
    found = data.standard_library()
    assert 0 < sum(map(len, found)) <= 200_000
    assert any(b"def " in document for document in found)
    assert found == data.standard_library()
