"""A run's state in a checkpoint, and back: weights, optimizer, scheduler, random generators.

Tensors have the model's own names: `model/<parameter>`, `optimizer/<parameter>/<state>`, `rng/<rank>/<generator>`. A rank saves
its box of each full tensor. Another topology reads the boxes that it needs.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardcomp.checkpoint.boxes import box_of, original_name, state_box
from shardcomp.checkpoint.compatibility import violations
from shardcomp.checkpoint.generators import generators, set_generators
from shardcomp.checkpoint.plain_values import plain, unplain
from shardcomp.checkpoint.storage import DTYPES, Box
from shardcomp.checkpoint.stored import Stored
from shardcomp.errors import CheckpointError, raise_all
from shardcomp.ir.packed import PackedSlice
from shardcomp.runtime.blueprint import ParameterPlan
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.stage_shard import LocalShard


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    boxes: this rank's tensors. notes: what the coordinator must know of this rank. common: what is the same on all ranks.
    """

    boxes: dict[str, Box]
    notes: dict[str, Any]
    common: dict[str, Any]

    def manifest(self, all_notes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The description of the checkpoint, from the notes of all ranks."""
        notes = list(all_notes)
        groups = [dict(group) for group in self.notes["groups"]]
        for index, group in enumerate(groups):
            group["parameters"] = list(dict.fromkeys(n for note in notes for n in note["groups"][index]["parameters"]))
        values = {name: states for note in notes for name, states in note["values"].items()}
        return {**self.common, "groups": groups, "values": values}


def snapshot(
    sharded: ShardedModel,
    optimizer: torch.optim.Optimizer | None,
    step: int,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Snapshot:
    """What there is to save. Copies nothing. Raises CheckpointError for states that cannot be saved."""
    shards = sharded.local_shards()
    boxes = {f"model/{name}": box_of(shard.parameters[0], shard) for name, shard in shards.items()}
    boxes |= {f"model/{name}": Box.full(buffer) for name, buffer in sharded.local_buffers().items()}
    groups: list[dict[str, Any]] = []
    values: dict[str, dict[str, Any]] = {}
    violations_found: list[str] = []
    names = {id(parameter): name for name, shard in shards.items() for parameter in shard.parameters}
    for group in optimizer.param_groups if optimizer else ():
        options = {key: option for key, option in group.items() if key != "params"}
        stray = sum(id(parameter) not in names for parameter in group["params"])
        if stray:
            violations_found.append(f"{stray} parameters of the optimizer are not the model's")
        known = dict.fromkeys(names[id(parameter)] for parameter in group["params"] if id(parameter) in names)
        groups.append({"options": plain(options, "the optimizer's options"), "parameters": list(known)})
        for name in known:
            [parameter, *_] = shards[name].parameters
            for key, state in optimizer.state.get(parameter, {}).items():  # type: ignore[union-attr]
                if isinstance(state, Tensor):
                    box = state_box(state, parameter, shards[name])
                    if box is None:
                        violations_found.append(
                            f"its state {key} of {name} is {tuple(state.shape)}, neither a number nor like {name}"
                        )
                    else:
                        boxes[f"optimizer/{name}/{key}"] = box
                else:
                    values.setdefault(name, {})[key] = plain(state, f"the optimizer's state {key} of {name}")
    violations_found += [f"{key} is {box.local.dtype}" for key, box in boxes.items() if box.local.dtype not in DTYPES]
    raise_all(CheckpointError, f"{type(optimizer).__name__} and the model cannot be saved", violations_found)
    rank = torch.distributed.get_rank()
    boxes |= {f"rng/{rank}/{name}": Box.full(state) for name, state in generators(sharded).items()}
    common = {
        "step": step,
        "optimizer": type(optimizer).__name__ if optimizer else None,
        "scheduler": plain(scheduler.state_dict(), "the scheduler's state") if scheduler else None,
        "extra": plain(dict(extra or {}), "extra"),
    }
    boxes = dict(sorted(boxes.items()))  # the same file, in whatever order the optimizer made its states
    return Snapshot(boxes, {"groups": groups, "values": values}, common | _of_model(sharded))


def _of_model(sharded: ShardedModel) -> dict[str, Any]:
    """What a checkpoint says of the model and its plan."""
    blueprint = sharded.blueprint
    return {
        "model": type(sharded.config).__name__,
        "mesh": asdict(blueprint.mesh),
        "device": sharded.device.type,
        "policy": blueprint.policy,
        "versions": versions(),
        "loss_scale": sharded.loss_scale.state_dict(),
        "skipped_steps": sharded.skipped_steps,
        "parts": {name: asdict(plan.part) for name, plan in blueprint.parameters.items() if plan.part},
        "aliases": {name: list(plan.aliases) for name, plan in blueprint.parameters.items() if plan.aliases},
        "parameters": list(blueprint.parameters),
        "buffers": list(blueprint.persistent_buffers),
        "tied_by_configuration": bool(getattr(sharded.config, "tie_word_embeddings", True)),
    }


def restore(
    path: Path,
    manifest: Mapping[str, Any],
    sharded: ShardedModel,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any = None,
) -> bool:
    """Put a checkpoint into a run of any topology. No collectives.

    Returns whether the random generators continue where they were, as on the same mesh and kind of device. Raises
    CheckpointError, before anything changes, where the checkpoint does not fit.
    """
    shards = sharded.local_shards()
    stored = Stored(path, manifest)
    raise_all(CheckpointError, f"{path} does not fit", violations(stored, sharded, optimizer, scheduler))
    requests = [_Request("model/{}", name, [box_of(p, shard) for p in shard.parameters]) for name, shard in shards.items()]
    if optimizer is not None:
        requests += _prepare(stored, shards, optimizer, sharded.blueprint.parameters)
    with torch.no_grad():
        _read(stored, sharded.blueprint.parameters, requests)
        stored.read({f"model/{name}": Box.full(buffer) for name, buffer in sharded.local_buffers().items()})
    if scheduler is not None:
        scheduler.load_state_dict(unplain(manifest["scheduler"]))
    if sharded.loss_scale.enabled and stored.precision == "fp16":
        sharded.loss_scale.load_state_dict(manifest["loss_scale"])
    sharded.skipped_steps = manifest["skipped_steps"]
    saved = (manifest["mesh"], manifest["device"], stored.policy_option("seed"))
    same = saved == (asdict(sharded.blueprint.mesh), sharded.device.type, sharded.blueprint.seed)
    if same:
        rank = torch.distributed.get_rank()
        set_generators(sharded, {name: stored.full(f"rng/{rank}/{name}") for name in generators(sharded)})
    else:
        sharded.random.restart(manifest["step"])
    return same


@dataclass(frozen=True)
class _Request:
    """One tensor to read: a parameter, or a state of its optimizer.

    key_pattern: `model/{}` or `optimizer/{}/<state>`. name: the parameter's. boxes: one for each copy of it on this rank.
    """

    key_pattern: str
    name: str
    boxes: list[Box]


def _prepare(
    stored: Stored,
    shards: Mapping[str, LocalShard],
    optimizer: torch.optim.Optimizer,
    plans: Mapping[str, ParameterPlan],
) -> list[_Request]:
    """Give the optimizer the options that were saved, and memory for its states."""
    names = {id(parameter): name for name, shard in shards.items() for parameter in shard.parameters}
    requests: dict[tuple[str, str], _Request] = {}
    for group in optimizer.param_groups:
        params = group["params"]
        saved = next(stored.group_of(original_name(names[id(p)], plans)) for p in params) if params else {}
        for key, option in saved.get("options", {}).items():
            group[key] = _like(unplain(option), group.get(key))
        for parameter in params:
            name = names[id(parameter)]
            [first, *_] = stored.packed[original_name(name, plans)]
            states: dict[str, Any] = unplain(stored.manifest["values"].get(first, {}))
            for key in stored.states_of(first):
                state, box = _new_state(stored, f"optimizer/{first}/{key}", parameter, shards[name], group)
                states[key] = state
                requests.setdefault((name, key), _Request(f"optimizer/{{}}/{key}", name, [])).boxes.append(box)
            optimizer.state[parameter] = states
    return list(requests.values())


def _new_state(
    stored: Stored, key: str, parameter: nn.Parameter, shard: LocalShard, group: Mapping[str, Any]
) -> tuple[Tensor, Box]:
    """Memory for the optimizer's tensor that was saved as `key`.

    If it had its parameter's dtype, it gets the dtype that the parameter has now.
    """
    if not stored.shape(key) and shard.shape:
        on_host = not (group.get("capturable") or group.get("fused"))  # where torch keeps the number of steps
        number = torch.zeros((), dtype=stored.dtype(key), device="cpu" if on_host else parameter.device)
        return number, Box.full(number)
    as_parameter = stored.dtype(key) == stored.dtype("model/" + key.split("/")[1])
    state = torch.zeros_like(parameter, dtype=parameter.dtype if as_parameter else stored.dtype(key), requires_grad=False)
    return state, box_of(state, shard)


def _read(stored: Stored, plans: Mapping[str, ParameterPlan], requests: Iterable[_Request]) -> None:
    """Fill the boxes: directly where the checkpoint has the same parameter, through the full packed weight where it splits that
    into other slices."""
    direct: dict[str, Box] = {}
    for request in requests:
        [box, *_] = request.boxes
        plan = plans[request.name]
        name = original_name(request.name, plans)
        if request.name in stored.packed_slices and stored.packed_slices[request.name] == plan.part:
            direct[request.key_pattern.format(request.name)] = box
        elif not box.shape:  # a number of steps: equal for all slices of a packed weight
            box.local.copy_(stored.full(request.key_pattern.format(stored.packed[name][0])))
        else:
            index = tuple(slice(at, at + n) for at, n in zip(box.offsets, box.local.shape, strict=True))
            box.local.copy_(_slice_of(stored.original(name, request.key_pattern), plan.part, index))
    stored.read(direct)
    for request in requests:
        for copy in request.boxes[1:]:
            copy.local.copy_(request.boxes[0].local)


def _slice_of(tensor: Tensor, packed_slice: PackedSlice | None, index: tuple[slice, ...]) -> Tensor:
    return packed_slice.read(lambda _, at: tensor[at], index) if packed_slice else tensor[index]


def _like(option: Any, current: Any) -> Any:
    """A saved option, as a tensor where the current one is a tensor."""
    if isinstance(current, Tensor):
        return torch.as_tensor(option, dtype=current.dtype, device=current.device)
    return option.item() if isinstance(option, Tensor) else option


def versions() -> dict[str, str]:
    """The releases that a checkpoint was saved with."""
    import transformers

    import shardcomp

    return {
        "shardcomp": shardcomp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
