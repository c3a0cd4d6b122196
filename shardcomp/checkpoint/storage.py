"""The tensors of a checkpoint in safetensors files, for torch.distributed.checkpoint: nothing in them is ever unpickled.

torch's planners decide which rank writes which box of a tensor, each box once, and which boxes a rank reads. Here they are
written and read. A rank has one file. It names each tensor `name@0,128`, with the offsets of its box in the full tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardcomp.checkpoint import directory
from shardcomp.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes that are saved, and what safetensors calls them."""
NAMED = {word: dtype for dtype, word in DTYPES.items()}


@dataclass(frozen=True)
class Box:
    """This rank's box `local` of a full tensor of the shape `shape`, starting at `offsets`.

    The three methods with underscores are torch.distributed.checkpoint's protocol.
    """

    local: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def full(tensor: Tensor) -> Box:
        """A box that is all of a tensor."""
        return Box(tensor, (0,) * tensor.dim(), tuple(tensor.shape))

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The box, as torch describes it."""
        return ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=self.local.size())

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if not self.local.numel():
            return []
        data = TensorWriteData(self.chunk, TensorProperties(dtype=self.local.dtype), torch.Size(self.shape))
        return [WriteItem(MetadataIndex(name, torch.Size(self.offsets)), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self.chunk] if self.local.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.local


class SavePlanner(DefaultSavePlanner):
    """Which rank writes what. notes: go to the coordinator with this rank's plan. all_notes: there, those of all ranks."""

    def __init__(self, notes: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.notes = notes
        self.all_notes: list[Mapping[str, Any]] = []

    def create_local_plan(self) -> SavePlan:
        """This rank's boxes, and its notes."""
        return dataclasses.replace(super().create_local_plan(), planner_data=self.notes)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Every box once. Called on the coordinator."""
        self.all_notes = [plan.planner_data for plan in all_plans]
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor of a box."""
        return self.state_dict[index.fqn].local


class LoadPlanner(DefaultLoadPlanner):
    """Which boxes a rank reads, into the tensors that it already has."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """As torch's, without allocating anything."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor of a box."""
        tensor: Tensor = self.state_dict[index.fqn].local
        return tensor


@dataclass(frozen=True)
class _Written:
    """The file that a box was written to, and the SHA-256 of the file."""

    file: str
    digest: str


class Writer(StorageWriter):
    """Writes a checkpoint: each rank its file, then the coordinator `checkpoint.json`, the sums, and last the name `path`.

    manifest: all ranks' notes -> what `checkpoint.json` says besides the tensors. files: further small files.
    """

    def __init__(self, path: Path, planner: SavePlanner, manifest: Any, files: Mapping[str, bytes]) -> None:
        self.path = path
        self.partial = directory.partial(path)
        self.planner = planner
        self.manifest = manifest
        self.files = files

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Only paths are known."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remove what an interrupted save left. The other ranks write later, when they have their plan."""
        if is_coordinator:
            directory.put_back(self.path)
            directory.refuse_others(self.path)
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank its file."""
        return [dataclasses.replace(plan, storage_data=f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        """Write this rank's file, tensor by tensor. Raises OSError."""
        written: Future[list[WriteResult]] = Future()
        results: list[WriteResult] = []
        if plan.items:
            with open(self.partial / plan.storage_data, "wb") as file:
                results = _write(file, plan, planner)
                directory.sync(file)
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and the sums, and publish. Called on the coordinator, after all ranks wrote. Raises OSError."""
        where = {(write.index.fqn, write.index.offset): write.storage_data for of_rank in results for write in of_rank}
        sums = {written.file: written.digest for written in where.values()}
        tensors = {
            name: {
                "dtype": DTYPES[tensor.properties.dtype],
                "shape": list(tensor.size),
                "pieces": [[list(box.offsets), list(box.sizes), where[name, box.offsets].file] for box in tensor.chunks],
            }
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        manifest = {"format": directory.FORMAT, **self.manifest(self.planner.all_notes), "tensors": tensors}
        for name, content in {**self.files, directory.MANIFEST: directory.manifest_text(manifest)}.items():
            sums[name] = directory.write(self.partial / name, content)
        directory.write(self.partial / directory.SUMS, directory.sums_text(sums).encode())
        directory.publish(self.path)


def key_of(name: str, offsets: Any) -> str:
    """The name of a box in its file."""
    return f"{name}@{','.join(str(at) for at in offsets)}"


def _write(file: BinaryIO, plan: SavePlan, planner: Any) -> list[WriteResult]:
    """Write a safetensors file: the length of the header, the header, then the bytes of the tensors."""
    header: dict[str, Any] = {}
    at = 0
    for item in plan.items:
        data = item.tensor_data
        assert data is not None
        length = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
        key = key_of(item.index.fqn, data.chunk.offsets)
        header[key] = {
            "dtype": DTYPES[data.properties.dtype],
            "shape": list(data.chunk.sizes),
            "data_offsets": [at, at + length],
        }
        at += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def put(content: Any) -> None:
        digest.update(content)
        file.write(content)

    put(len(text).to_bytes(8, "little"))
    put(text)
    for item in plan.items:
        tensor = planner.resolve_data(item).detach().contiguous().cpu()
        put(tensor.reshape(-1).view(torch.uint8).numpy())
    written = _Written(plan.storage_data, digest.hexdigest())
    return [WriteResult(item.index, item.tensor_storage_size() or 0, written) for item in plan.items]


class Reader(StorageReader):
    """Reads the tensors of the checkpoint at `path`. manifest: its `checkpoint.json`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata, self.files = described(path, manifest)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one load to the next."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Only paths are known."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The tensors and their boxes."""
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """Read the planned boxes, file by file. Raises CheckpointError naming the file."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            assert item.storage_index.offset is not None
            by_file.setdefault(self.files[item.storage_index.fqn, item.storage_index.offset], []).append(item)
        for name, items in by_file.items():
            try:
                with safe_open(str(self.path / name), framework="pt") as file:
                    for item in items:
                        self._read(file, item, planner)
            except (SafetensorError, OSError) as problem:
                raise CheckpointError(f"{self.path / name} cannot be read: {problem}") from problem
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @staticmethod
    def _read(file: Any, item: ReadItem, planner: Any) -> None:
        key = key_of(item.storage_index.fqn, item.storage_index.offset)
        index = tuple(slice(at, at + n) for at, n in zip(item.storage_offsets, item.lengths, strict=True))
        stored = file.get_slice(key)[index] if index else file.get_tensor(key)
        tensor = planner.resolve_tensor(item).detach()
        tensor.copy_(stored)
        planner.commit_tensor(item, tensor)


def described(path: Path, manifest: Mapping[str, Any]) -> tuple[Metadata, dict[tuple[str, torch.Size], str]]:
    """torch's description of the tensors, and the file of each box. Raises CheckpointError for a manifest without one."""
    try:
        tensors = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=NAMED[entry["dtype"]]),
                torch.Size(entry["shape"]),
                [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size, _ in entry["pieces"]],
            )
            for name, entry in manifest["tensors"].items()
        }
        files = {
            (name, torch.Size(at)): str(file) for name, entry in manifest["tensors"].items() for at, _, file in entry["pieces"]
        }
    except (KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(f"{path / directory.MANIFEST} does not describe its tensors ({problem!r})") from problem
    return Metadata(tensors), files
