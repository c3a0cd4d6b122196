"""Nothing damaged is ever loaded: every byte of every file counts, and what was good before is used where that is asked for."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoint.legs import adamw, lowered_for, train

from shardcomp import CheckpointError, checkpoint
from shardcomp.checkpoint import directory
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny
from support.selection import LONG


@cache
def lowered(tensor: int) -> Lowered:
    return lowered_for(tiny(tie_word_embeddings=True), tensor=tensor)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    root = tmp_path_factory.mktemp("run")
    train(lowered(2), 1, save=root / directory.name_of(1))
    train(lowered(2), 2, load=root, save=root / directory.name_of(2))
    return root


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def files(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_file())


def flip(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"bit of byte {at} flipped"


def shorten(path: Path, draw: random.Random) -> str:
    size = path.stat().st_size
    os.truncate(path, draw.randrange(size))
    return "truncated"


def lengthen(path: Path, draw: random.Random) -> str:
    path.write_bytes(path.read_bytes() + bytes([draw.randrange(256)]))
    return "a byte more"


def lose(path: Path, draw: random.Random) -> str:
    path.unlink()
    return "missing"


def blank(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    end = min(len(content), at + draw.choice([1, 64, 4096]))
    content[at:end] = bytes(b ^ 0xFF for b in content[at:end])
    path.write_bytes(content)
    return f"bytes {at} to {end} overwritten"


def swap(path: Path, draw: random.Random) -> str:
    other = draw.choice([each for each in files(path.parent) if each != path])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"swapped with {other.name}"


def foreign(path: Path, draw: random.Random) -> str:
    elsewhere = path.parent.with_name(directory.name_of(1)) / path.name
    path.write_bytes(elsewhere.read_bytes())
    return "that of another checkpoint"


def stray(path: Path, draw: random.Random) -> str:
    shutil.copy(path, path.with_name(f"rank-{draw.randrange(5, 9):05d}.safetensors"))
    return "a copy of it beside it"


WAYS: list[Callable[[Path, random.Random], str]] = [flip, flip, flip, shorten, lengthen, lose, blank, swap, foreign, stray]


def attempt(path: Path) -> str | None:
    """What loading says; None where it loads."""

    one_rank = lowered(1)

    def work(rank: int) -> str | None:
        sharded = allocate(one_rank, weights_of(one_rank))
        before = {name: p.to_local().clone() for name, p in sharded.named_parameters()}
        optimizer = adamw(sharded)
        try:
            checkpoint.load(path, sharded, optimizer)
        except CheckpointError as problem:
            assert all(torch.equal(p.to_local(), before[name]) for name, p in sharded.named_parameters())
            assert not optimizer.state
            return str(problem)
        return None

    return run_ranks(1, work)[0]


def corruptions(count: int) -> Iterator[int]:
    draw = random.Random(None if LONG else 3)
    return iter(draw.sample(range(10**6), count))


@pytest.mark.parametrize("block", range(4))
def test_of_200_drawn_corruptions_none_is_loaded(block: int, saved: Path, tmp_path: Path) -> None:
    assert attempt(saved) is None
    for seed in list(corruptions(200))[block::4]:
        draw = random.Random(seed)
        run = tmp_path / str(seed)
        shutil.copytree(saved, run)
        path = run / directory.name_of(2)
        victim = draw.choice(files(path))
        way = draw.choice(WAYS)
        content = {each.name: each.read_bytes() for each in files(path)}
        what = way(victim, draw)
        if {each.name: each.read_bytes() for each in files(path)} != content:
            said = attempt(run)
            assert said is not None and str(path) in said, (seed, way, victim.name, what)
            if way in (flip, blank, shorten, lengthen) and victim.name != directory.SUMS:
                assert victim.name in said or directory.SUMS in said, said
        shutil.rmtree(run)


@pytest.mark.parametrize("name", ["checkpoint.json", "rank-00001.safetensors", "config.json", "SHA256SUMS"])
def test_the_one_before_is_used_where_that_is_asked_for(name: str, run: Path) -> None:
    newest, before = run / directory.name_of(2), run / directory.name_of(1)
    untouched = {each.name: each.read_bytes() for each in files(before)}
    flip(newest / name, random.Random(0))

    def work(rank: int) -> tuple[checkpoint.Restored, list[str]]:
        sharded = allocate(lowered(2), weights_of(lowered(2)))
        lines: list[str] = []
        found = checkpoint.load(run, sharded, adamw(sharded), fallback=True, say=lines.append)
        return found, lines

    [(found, lines), (other, none)] = run_ranks(2, work)
    assert found.path == other.path == before and found.step == 1
    assert list(found.passed_over) == [newest] and len(lines) == 1 and not none
    assert str(newest) in lines[0] and str(before) in lines[0]
    assert {each.name: each.read_bytes() for each in files(before)} == untouched


def test_where_none_is_good_the_last_problem_is_told(run: Path) -> None:
    for step in (1, 2):
        lose(run / directory.name_of(step) / "config.json", random.Random(0))

    def work(rank: int) -> None:
        sharded = allocate(lowered(2), weights_of(lowered(2)))
        checkpoint.load(run, sharded, fallback=True)

    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=r"step-00000001/config.json is missing"):
        warnings.simplefilter("ignore")
        run_ranks(2, work)


def test_a_newer_format_names_the_release_that_wrote_it(run: Path) -> None:
    path = run / directory.name_of(2)
    manifest = json.loads((path / directory.MANIFEST).read_text())
    manifest["format"], manifest["versions"]["shardcomp"] = 2, "9.9"
    sums = directory.read_sums(path)
    sums[directory.MANIFEST] = directory.write(path / directory.MANIFEST, directory.manifest_text(manifest))
    directory.write(path / directory.SUMS, directory.sums_text(sums).encode())
    said = attempt(path)
    assert said is not None and "format 2" in said and "9.9" in said and str(path) in said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: root / "nothing", "does not exist"),
        (lambda root: root, "holds no checkpoint"),
        (lambda root: (root / "step-00000003").mkdir() or root, "SHA256SUMS is missing"),
        (lambda root: (root / "step-00000003").write_text("x") and root / "step-00000003", "holds no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused(make: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    found = attempt(make(tmp_path))
    assert found is not None and said in found, found


def test_the_sums_are_what_sha256sum_reads(saved: Path) -> None:
    import subprocess

    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=saved / directory.name_of(2), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
