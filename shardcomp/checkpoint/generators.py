"""The random generators of a rank, as tensors in a checkpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from shardcomp.kernels.dropout import SAME_SHARD
from shardcomp.runtime.model import ShardedModel

_STORED = {SAME_SHARD: "piece"}
"""Stream -> its name in checkpoints, where that is an older one."""


def generators(sharded: ShardedModel) -> dict[str, Tensor]:
    """The state of every generator of this rank as uint8 tensors: dropout's, Python's, NumPy's, torch's."""
    states = {f"dropout.{_STORED.get(name, name)}": state for name, state in sharded.random.state_dict().items()}
    states["python"] = _bytes(random.getstate())
    kind, keys, *rest = numpy.random.get_state(legacy=True)  # noqa: NPY002
    states["numpy"] = _bytes([kind, numpy.asarray(keys).tolist(), *rest])
    states["torch"] = torch.get_rng_state()
    if sharded.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(sharded.device)
    return states


def set_generators(sharded: ShardedModel, states: Mapping[str, Tensor]) -> None:
    """Continue from the states that `generators` returned."""
    sharded.random.load_state_dict({name: states[f"dropout.{_STORED.get(name, name)}"] for name in sharded.random.state_dict()})
    version, numbers, gauss = json.loads(bytes(states["python"].tolist()))
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = json.loads(bytes(states["numpy"].tolist()))
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], sharded.device)


def _bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
