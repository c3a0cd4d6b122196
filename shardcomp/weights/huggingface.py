"""HuggingFace directories: reading one rank's slices of safetensors, and writing a directory from all ranks.

Nothing is ever unpickled, and no process holds more of a model than one file of it.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shardcomp.errors import CheckpointError, InternalError, ShardError, raise_all
from shardcomp.weights.atomic_dir import Staging
from shardcomp.weights.hf_names import is_computed, resolve

Entry = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]
"""A tensor to save: its name, full shape, dtype, and a collective call that returns it on the CPU."""

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (SINGLE, INDEX, "model-*-of-*.safetensors")
PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The dtypes of weights and their sizes in bytes."""
SHOWN = 8
BLOCK = 16 * 2**20
"""Bytes of a file that may be mapped into memory at a time. The pages of an open file count as the process's memory."""


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file; `dtype` as the file says it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """The tensors of a HuggingFace directory (`model.safetensors`, or its index and shards). Opening reads headers only.

    bytes_read: counts the bytes of the slices that were read. Raises CheckpointError where there is nothing to open; `check`
    reports what is wrong with the files.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        self.bytes_read = 0
        self._tensors: dict[str, _Stored] = {}  # by the name in the file
        self._unreadable: dict[str, str] = {}  # file -> why
        self._problems: list[str] = []
        self._stored_as: dict[str, list[str]] = {}  # the model's name -> the names in the files
        self._promised: dict[str, str] = {}  # name -> file, as the index says
        self._mapped: tuple[str, Any, int] = ("", None, 0)  # the file in use, and how much of it was touched
        for file in self._files():
            self._open(file)
        for name, file in self._promised.items():
            if name not in self._tensors and file not in self._unreadable:
                self._problems.append(f"{INDEX} says that {file} holds {name}, but it does not")

    def _files(self) -> list[str]:
        if not self.directory.is_dir():
            kind = "is not a directory" if self.directory.exists() else "does not exist"
            raise CheckpointError(f"{self.directory} {kind}: give a directory that save_pretrained wrote or the hub gave")
        if (self.directory / SINGLE).exists():
            return [SINGLE]
        if (self.directory / INDEX).exists():
            return self._indexed()
        names = sorted(path.name for path in self.directory.iterdir())
        pickled = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in PICKLED)]
        if pickled:
            raise CheckpointError(
                f"{self.directory}: its weights are pickled ({_some(pickled)}), and unpickling runs what a file says: load "
                "them with transformers where you trust them, and save again with save_pretrained, which writes safetensors"
            )
        raise CheckpointError(f"{self.directory} holds neither {SINGLE} nor {INDEX}, only {_some(names) or 'nothing'}")

    def _indexed(self) -> list[str]:
        try:
            files = json.loads((self.directory / INDEX).read_text())["weight_map"]
            self._promised = {str(name): str(file) for name, file in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise CheckpointError(
                f"{self.directory / INDEX} is damaged ({type(problem).__name__}: {problem}): get the directory again"
            ) from problem
        outside = [file for file in self._promised.values() if Path(file).name != file]
        if outside:
            raise CheckpointError(f"{self.directory / INDEX} names {outside[0]}, which is not a file of this directory")
        return sorted(set(self._promised.values()))

    def _open(self, file: str) -> None:
        try:
            with safe_open(str(self.directory / file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(name)
                    if name in self._tensors:
                        self._problems.append(f"{name} is in {self._tensors[name].file} and in {file}")
                    self._tensors[name] = _Stored(file, tuple(header.get_shape()), str(header.get_dtype()))
        except FileNotFoundError:
            self._unreadable[file] = f"{file} is missing, but {INDEX} names it: get the file"
        except (SafetensorError, OSError) as problem:
            self._unreadable[file] = f"{file} is truncated or no safetensors file ({problem}): get the file again"

    def check(
        self, expected: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str] | None = None, model: Any = None
    ) -> None:
        """Compare the headers with a model. Raises one CheckpointError with everything that does not fit.

        expected: full shapes by name, of packed weights as one. aliases: the other names of tied weights -> the name in
        `expected`; a tied weight may be stored under any of its names, or several. model: its class knows earlier names of its
        weights, and which further tensors its files may have.
        """
        names = {name: name for name in expected} | dict(aliases or {})
        spelled = resolve(dict.fromkeys([*self._tensors, *self._promised]), names, model)
        self._stored_as = {name: [] for name in expected}
        for stored in self._tensors:
            if spelled[stored] in names:
                self._stored_as[names[spelled[stored]]].append(stored)
        # A tensor of a damaged file is not reported as missing too. Without an index that may be any tensor.
        excused = {names.get(spelled[n]) for n, file in self._promised.items() if file in self._unreadable}
        if self._unreadable and not self._promised:
            excused = set(expected)
        raise_all(CheckpointError, str(self.directory), self._violations(expected, excused, spelled, model))

    def _violations(
        self, expected: Mapping[str, tuple[int, ...]], excused: set[str | None], spelled: Mapping[str, str], model: Any
    ) -> Iterator[str]:
        yield from self._unreadable.values()
        yield from self._problems
        other = "is this another model, or one whose weights transformers joins as it loads? Then load and save it with those"
        missing = [name for name in expected if not self._stored_as[name] and name not in excused]
        if missing:
            yield f"{len(missing)} of the model's {len(expected)} tensors are missing: {_some(missing)}; {other}"
        stored = [(name, spelling) for name, spellings in self._stored_as.items() for spelling in spellings]
        known = {spelling for _, spelling in stored}
        unexpected = [n for n, t in self._tensors.items() if n not in known and not is_computed(spelled[n], t.shape, model)]
        if unexpected:
            yield f"{len(unexpected)} tensors are not the model's: {_some(unexpected)}; {other}"
        misshapen = [
            f"{spelling} is {_shape(tensor.shape)} in {tensor.file} and {_shape(expected[name])} in the model"
            for name, spelling in stored
            if (tensor := self._tensors[spelling]).shape != tuple(expected[name])
        ]
        yield from misshapen[:SHOWN]
        if len(misshapen) > SHOWN:
            yield f"{len(misshapen) - SHOWN} more tensors have other shapes than the model's"
        coded = [f"{s} ({self._tensors[s].dtype})" for _, s in stored if self._tensors[s].dtype not in SIZES]
        if coded:
            yield f"{len(coded)} tensors are quantized, or no weights: {_some(coded)}; give the unquantized weights"

    def read(self, name: str, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """A slice of a tensor, on the CPU in `dtype`. index: a slice without step for each dim.

        Only the rows of the slice are read, a block at a time. Raises CheckpointError where the file has changed since it was
        opened, or where one weight is stored under two names with two values.
        """
        stored = self._stored_as.get(name) or [name]
        part = self._read(stored[0], index, dtype)
        for other in stored[1:]:
            if not torch.equal(part, self._read(other, index, dtype)):
                raise CheckpointError(
                    f"{self.directory}: {stored[0]} and {other} are one weight in the model, but differ in the files: it was "
                    "trained untied (tie_word_embeddings = false)"
                )
        return part

    def _read(self, name: str, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.directory} holds no {name}")
        stored = self._tensors[name]
        result = torch.empty([range_.stop - range_.start for range_ in index], dtype=dtype, device="cpu")
        row = max(1, math.prod(stored.shape[1:]) * SIZES.get(stored.dtype, 8))
        try:
            if not index:
                return result.copy_(self._mapping(stored.file, row).get_tensor(name))
            at = index[0].start
            for block in result.split(max(1, BLOCK // row)):
                read = self._mapping(stored.file, len(block) * row).get_slice(name)[slice(at, at + len(block)), *index[1:]]
                block.copy_(read)
                self.bytes_read += read.nbytes
                at += len(block)
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(f"{self.directory / stored.file} can no longer be read: {problem}") from problem
        return result

    def _mapping(self, file: str, nbytes: int) -> Any:
        """An open file. It is opened again, which frees its pages, before more than a block of it is in memory."""
        last, opened, touched = self._mapped
        if file != last or touched + nbytes > BLOCK:
            opened, touched = safe_open(str(self.directory / file), framework="pt"), 0
        self._mapped = (file, opened, touched + nbytes)
        return opened


def save_pretrained(
    directory: str | Path,
    tensors: Iterable[Entry],
    config: Any,
    is_writer: bool,
    max_shard_size: int = 5 * 10**9,
    generation_config: Any = None,
) -> None:
    """Write a directory that transformers' `from_pretrained` loads: config.json, and safetensors of at most `max_shard_size`
    bytes (or one tensor) a file.

    Every rank calls this with the same list, since the calls in it are collective. Only the writer keeps what they return, one
    file at a time, and writes it. The directory appears when it is complete, so that a save that fails leaves what was there.
    It replaces an earlier save, whose other files stay. Any other directory is refused. The writer raises CheckpointError after
    all collectives, so that no rank waits for it in one.
    """
    if config is None:
        raise CheckpointError("the model has no HuggingFace configuration: save its state with torch.distributed.checkpoint")
    if max_shard_size < 1:
        raise CheckpointError(f"max_shard_size = {max_shard_size}: give a number of bytes, such as {5 * 10**9}")
    shards = _shards(tensors, max_shard_size)
    if not is_writer:
        for shard in shards.values():
            for *_, fetch in shard:
                fetch()
        return
    save = _Save(Path(directory))
    try:
        save.attempt(save.begin, config, generation_config, shards)
        for file, shard in shards.items():
            fetched = {}
            for name, *_, fetch in shard:
                tensor = fetch()
                if save.failure is None:
                    fetched[name] = tensor
            save.attempt(save.write, file, shard, fetched)
        save.attempt(save.staging.commit)
    finally:
        save.staging.discard()
    if isinstance(save.failure, ShardError):
        raise save.failure
    if save.failure is not None:
        raise CheckpointError(f"{directory}: not saved: {type(save.failure).__name__}: {save.failure}") from save.failure


class _Save:
    """The writer's part of a save. After the first failure, which it stores, it attempts nothing more."""

    def __init__(self, destination: Path) -> None:
        self.staging = Staging(destination, (CONFIG, *WEIGHTS), _is_save)
        self.path = self.staging.path
        self.failure: Exception | None = None

    def attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        if self.failure is None:
            try:
                step(*arguments)
            except Exception as problem:
                self.failure = problem

    def begin(self, config: Any, generation_config: Any, shards: Mapping[str, list[Entry]]) -> None:
        self.staging.begin()
        entries = [entry for shard in shards.values() for entry in shard]
        _described(config, entries).save_pretrained(self.path)
        if generation_config is not None:
            generation_config.save_pretrained(self.path)
        if len(shards) > 1:
            total = sum(_nbytes(entry) for entry in entries)
            where = {entry[0]: file for file, shard in shards.items() for entry in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (self.path / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, file: str, shard: list[Entry], fetched: dict[str, Tensor]) -> None:
        for name, shape, dtype, _ in shard:
            tensor = fetched[name]
            if (tuple(tensor.shape), tensor.dtype) != (tuple(shape), dtype):
                raise InternalError(f"{name}: {tensor.dtype} {_shape(tensor.shape)} was to be {dtype} {_shape(shape)}")
            fetched[name] = tensor.contiguous()
        save_file(fetched, self.path / file, metadata={"format": "pt"})
        shutil.copymode(self.path / CONFIG, self.path / file)  # safetensors gives only its owner access


def _is_save(directory: Path) -> bool:
    """Whether a directory was written by `save_pretrained`, ours or transformers', as safetensors."""
    return (directory / CONFIG).is_file() and any(any(directory.glob(pattern)) for pattern in WEIGHTS)


def _shards(tensors: Iterable[Entry], limit: int) -> dict[str, list[Entry]]:
    """The tensors of each file, in order, with as many in a file as `limit` bytes allow."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in tensors:
        if shards[-1] and size + _nbytes(entry) > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += _nbytes(entry)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _nbytes(entry: Entry) -> int:
    return math.prod(entry[1]) * entry[2].itemsize


def _described(config: Any, entries: list[Entry]) -> Any:
    """A copy of the configuration that names the class, and the dtype that most of the weights have: what is loaded with
    `dtype="auto"`, transformers 5's default, is then what was saved."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    saved = copy.deepcopy(config)
    sizes: dict[torch.dtype, int] = {}
    for entry in entries:
        if entry[2].is_floating_point:
            sizes[entry[2]] = sizes.get(entry[2], 0) + _nbytes(entry)
    if sizes:
        # Releases before 4.56 know the dtype by another name.
        setattr(saved, "dtype" if hasattr(saved, "dtype") else "torch_dtype", max(sizes, key=lambda dtype: sizes[dtype]))
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(saved.model_type)
    if not saved.architectures and isinstance(known, str):
        saved.architectures = [known]
    return saved


def _shape(sizes: Iterable[int]) -> str:
    return "×".join(str(size) for size in sizes) or "a scalar"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
