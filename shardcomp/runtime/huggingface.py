"""HuggingFace directories: reading only this rank's part of each tensor, and writing a model from all ranks together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shardcomp.errors import CheckpointError, raise_all

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Entry = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]
"""(name, global shape, dtype, a function that every rank calls and that returns the whole tensor on the CPU)."""


class WeightFiles:
    """The safetensors files of a HuggingFace directory. Opening reads headers only; nothing is ever unpickled."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._aliases: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        self._where: dict[str, Path] = {}
        problems = []
        for path in self._paths():
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as fault:
                problems.append(f"{path.name} is not a whole safetensors file: {fault}")
                continue
            self._files[str(path)] = file
            self._where.update(dict.fromkeys(file.keys(), path))
        raise_all(CheckpointError, str(self.directory), problems)

    def _paths(self) -> list[Path]:
        at = self.directory
        if not at.is_dir():
            raise CheckpointError(f"{at}: no such directory; give a directory with {SINGLE} or {INDEX}")
        if (at / INDEX).is_file():
            try:
                names = sorted(set(json.loads((at / INDEX).read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as fault:
                raise CheckpointError(f"{at / INDEX} is not an index of safetensors files: {fault}") from fault
            strange = [name for name in names if Path(name).name != name]
            missing = [name for name in names if not (at / name).is_file()]
            if strange or missing:
                raise CheckpointError(f"{at / INDEX} names files that are not there: {', '.join(strange + missing)}")
            return [at / name for name in names]
        if (at / SINGLE).is_file():
            return [at / SINGLE]
        pickled = sorted(path.name for path in at.glob("*.bin"))
        if pickled:
            raise CheckpointError(
                f"{at} has only {', '.join(pickled[:3])}, which would have to be unpickled; save the model with "
                "save_pretrained(safe_serialization=True) first"
            )
        raise CheckpointError(f"{at} has neither {SINGLE} nor {INDEX}")

    def check(self, expected: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str], spare: Iterable[str] = ()) -> None:
        """Raise one CheckpointError that lists every tensor that is missing, unexpected or of another shape.

        expected: name -> global shape. aliases: another name of a tied weight -> its name; either may be in the files. spare: names
        that the files may hold beside, such as buffers.
        """
        self._aliases = {}
        for alias, name in aliases.items():
            if name not in self._where and alias in self._where:
                self._aliases[name] = alias
        problems = []
        for name, shape in expected.items():
            found = self._shape(name)
            if found is None:
                problems.append(f"{name} is missing")
            elif found != tuple(shape):
                problems.append(f"{name} has the shape {list(found)}, the model's is {list(shape)}")
        known = {*expected, *aliases, *spare}
        unexpected = [n for n in self._where if n not in known and not n.endswith(("inv_freq", ".masked_bias", ".attn.bias"))]
        problems += [f"{name} is not in the model" for name in unexpected]
        if len(problems) > 24:
            problems = [*problems[:24], f"and {len(problems) - 24} more: the files are of another model"]
        raise_all(CheckpointError, str(self.directory), problems)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        stored = self._aliases.get(name, name)
        if stored not in self._where:
            return None
        return tuple(self._files[str(self._where[stored])].get_slice(stored).get_shape())

    def read(self, name: str, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """One part of a tensor; only its bytes are read."""
        stored = self._aliases.get(name, name)
        path = self._where[stored]
        try:
            part = self._files[str(path)].get_slice(stored)[index]
        except (SafetensorError, OSError, ValueError) as fault:
            raise CheckpointError(f"{path}: {stored} cannot be read: {fault}") from fault
        self.bytes_read += part.numel() * part.element_size()
        return part.to(dtype)


def save_pretrained(
    directory: str | Path, entries: Iterable[Entry], config: Any, is_writer: bool, max_shard_size: int = 5 * 1024**3
) -> None:
    """Write config.json and safetensors files of at most `max_shard_size` bytes each.

    Every rank calls this with the same entries; the writer holds one file's tensors at a time. The directory appears at the end, so
    that a save which fails leaves what was there. Raises CheckpointError where something other than an earlier save is there.
    """
    target = Path(directory)
    if is_writer:
        check_target(target)
    shards = _shards(list(entries), max_shard_size)
    scratch = target.with_name(f".{target.name}.saving")
    if is_writer:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    total, weight_map = 0, {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, _, _, fetch in shard:
            tensor = fetch()
            if is_writer:
                tensors[name] = tensor.contiguous()
                total += tensor.numel() * tensor.element_size()
                weight_map[name] = file
        if is_writer:
            save_file(tensors, scratch / file, metadata={"format": "pt"})
    if not is_writer:
        return
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (scratch / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if config is not None:
        config.save_pretrained(scratch)
    _put_in_place(scratch, target)


def check_target(target: Path) -> None:
    """Raise CheckpointError unless a model may be written to `target`: nothing is there, or an earlier save."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a directory")
    foreign = sorted(p.name for p in target.iterdir() if not _is_ours(p))
    if foreign:
        raise CheckpointError(f"{target} holds {', '.join(foreign[:3])}, which no earlier save wrote; give an empty or new directory")


def _is_ours(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name in (INDEX, "config.json", "generation_config.json")


def _shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        _, shape, dtype, _ = entry
        one = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + one > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += one
    return shards


def _put_in_place(scratch: Path, target: Path) -> None:
    """Rename, so that the target is the old save or the new one, and never a mixture."""
    if not target.exists():
        scratch.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    scratch.rename(target)
    shutil.rmtree(old, ignore_errors=True)
