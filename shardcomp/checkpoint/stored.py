"""The tensors of one checkpoint on the disk, read without collectives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardcomp.checkpoint.storage import Box, LoadPlanner, Reader
from shardcomp.ir.packed import PackedSlice, assemble, group_by_packed


class Stored:
    """The tensors of a checkpoint, under the names of the model that saved them.

    packed_slices: the packed slice that each of its parameters is, or None. packed: HuggingFace's name -> the names of its
    slices.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.reader = Reader(path, manifest)
        self.packed_slices = {
            name: PackedSlice(**{**saved, "shape": tuple(saved["shape"])}) if (saved := manifest["parts"].get(name)) else None
            for name in manifest["parameters"]
        }
        self.packed = group_by_packed(self.packed_slices)
        self.precision = self.policy_option("precision")

    def policy_option(self, name: str) -> Any:
        """An option of the policy that the checkpoint was saved under."""
        return self.manifest["policy"].get("options", {}).get(name)

    def __contains__(self, key: str) -> bool:
        return key in self.reader.metadata.state_dict_metadata

    def shape(self, key: str) -> tuple[int, ...]:
        """The full shape of a tensor."""
        return tuple(self.reader.metadata.state_dict_metadata[key].size)  # type: ignore[union-attr]

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that a tensor was saved in."""
        dtype: torch.dtype = self.reader.metadata.state_dict_metadata[key].properties.dtype  # type: ignore[union-attr]
        return dtype

    def states_of(self, name: str) -> list[str]:
        """The optimizer's tensors for a parameter."""
        prefix = f"optimizer/{name}/"
        return [key[len(prefix) :] for key in self.reader.metadata.state_dict_metadata if key.startswith(prefix)]

    def read(self, boxes: Mapping[str, Box]) -> None:
        """Fill the tensors of boxes. No collectives. Raises CheckpointError naming the file that cannot be read."""
        planner = LoadPlanner()
        planner.set_up_planner(dict(boxes), self.reader.metadata, is_coordinator=True)
        plan = planner.create_local_plan()
        self.reader.read_data(planner.finish_plan(plan), planner)

    def full(self, key: str) -> Tensor:
        """A full tensor, on the CPU."""
        tensor = torch.empty(self.shape(key), dtype=self.dtype(key))
        self.read({key: Box.full(tensor)})
        return tensor

    def original_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as HuggingFace has it."""
        [first, *_] = self.packed[name]
        packed_slice = self.packed_slices[first]
        return packed_slice.shape if packed_slice else self.shape(f"model/{first}")

    def original(self, name: str, key: str = "model/{}") -> Tensor:
        """A tensor as HuggingFace has it, a packed one assembled. key: `model/{}`, or `optimizer/{}/<state>` for its state."""
        tensors = {param_name: self.full(key.format(param_name)) for param_name in self.packed[name]}
        is_packed = any(self.packed_slices[param_name] for param_name in tensors)
        return assemble(name, self.packed_slices, tensors) if is_packed else tensors[name]

    def group_of(self, name: str) -> dict[str, Any]:
        """The optimizer's parameter group that a tensor was in; empty where it was in none."""
        members = set(self.packed[name])
        return next((group for group in self.manifest["groups"] if members & set(group["parameters"])), {})
