"""What a checkpoint holds of a run on this rank, and how it goes back into another one: weights, optimizer, random numbers.

Tensors are named for the model's own: `model/<parameter>`, `optimizer/<parameter>/<state>`, `rng/<rank>/<generator>`. A rank
saves the box of each that it has, so that any other way of cutting finds its own box in them.
"""

from __future__ import annotations

import json
import platform
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardcomp.checkpoint.storage import DTYPES, NAMED, LoadPlanner, Piece, Reader
from shardcomp.errors import CheckpointError, raise_all
from shardcomp.ir.packed import PackedSlice, assemble, group_by_packed
from shardcomp.runtime.allocation import LocalShard
from shardcomp.runtime.blueprint import ParameterPlan
from shardcomp.runtime.model import ShardedModel

SHOWN = 8


@dataclass(frozen=True)
class Captured:
    """A run at one moment: this rank's tensors, what the coordinator has to know of this rank, and what all ranks agree on."""

    pieces: dict[str, Piece]
    notes: dict[str, Any]
    common: dict[str, Any]

    def manifest(self, everyones: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The description of the checkpoint, from all ranks' notes."""
        notes = list(everyones)
        groups = [dict(group) for group in self.notes["groups"]]
        for index, group in enumerate(groups):
            group["parameters"] = list(dict.fromkeys(n for held in notes for n in held["groups"][index]["parameters"]))
        values = {name: held for note in notes for name, held in note["values"].items()}
        return {**self.common, "groups": groups, "values": values}


def snapshot(
    sharded: ShardedModel,
    optimizer: torch.optim.Optimizer | None,
    step: int,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Captured:
    """What there is to save. Nothing is copied. Raises CheckpointError for states that cannot be saved."""
    held = sharded.held_parameters()
    pieces = {f"model/{name}": _piece(each.parameters[0], each) for name, each in held.items()}
    pieces |= {f"model/{name}": Piece.of_whole(buffer) for name, buffer in sharded.held_buffers().items()}
    groups: list[dict[str, Any]] = []
    values: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    names = {id(parameter): name for name, each in held.items() for parameter in each.parameters}
    for group in optimizer.param_groups if optimizer else ():
        options = {key: option for key, option in group.items() if key != "params"}
        stray = sum(id(parameter) not in names for parameter in group["params"])
        if stray:
            problems.append(f"{stray} parameters of the optimizer are not the model's")
        known = dict.fromkeys(names[id(parameter)] for parameter in group["params"] if id(parameter) in names)
        groups.append({"options": plain(options, "the optimizer's options"), "parameters": list(known)})
        for name in known:
            [parameter, *_] = held[name].parameters
            for key, state in optimizer.state.get(parameter, {}).items():  # type: ignore[union-attr]
                if isinstance(state, Tensor):
                    found = _state_piece(state, parameter, held[name])
                    if found is None:
                        problems.append(f"its state {key} of {name} is {tuple(state.shape)}, neither a number nor like {name}")
                    else:
                        pieces[f"optimizer/{name}/{key}"] = found
                else:
                    values.setdefault(name, {})[key] = plain(state, f"the optimizer's state {key} of {name}")
    problems += [f"{key} is {piece.local.dtype}" for key, piece in pieces.items() if piece.local.dtype not in DTYPES]
    raise_all(CheckpointError, f"{type(optimizer).__name__} and the model cannot be saved", problems)
    rank = torch.distributed.get_rank()
    pieces |= {f"rng/{rank}/{name}": Piece.of_whole(state) for name, state in _generators(sharded).items()}
    blueprint = sharded.blueprint
    common = {
        "step": step,
        "model": type(sharded.config).__name__,
        "mesh": asdict(blueprint.mesh),
        "device": sharded.device.type,
        "policy": blueprint.policy,
        "versions": versions(),
        "optimizer": type(optimizer).__name__ if optimizer else None,
        "scheduler": plain(scheduler.state_dict(), "the scheduler's state") if scheduler else None,
        "loss_scale": sharded.loss_scale.state_dict(),
        "skipped_steps": sharded.skipped_steps,
        "extra": plain(dict(extra or {}), "extra"),
        "parts": {name: asdict(plan.part) for name, plan in blueprint.parameters.items() if plan.part},
        "aliases": {name: list(plan.aliases) for name, plan in blueprint.parameters.items() if plan.aliases},
        "parameters": list(blueprint.parameters),
        "buffers": list(blueprint.persistent_buffers),
        "tied_by_configuration": bool(getattr(sharded.config, "tie_word_embeddings", True)),
    }
    pieces = dict(sorted(pieces.items()))  # the same files, whatever order the optimizer came by its states in
    return Captured(pieces, {"groups": groups, "values": values}, common)


def restore(
    path: Path,
    manifest: Mapping[str, Any],
    sharded: ShardedModel,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any = None,
) -> bool:
    """Put a checkpoint into a run, which may be cut in any other way. Returns whether the random numbers go on where they were:
    they do on the mesh and the kind of device that they were saved from. No collectives. Raises CheckpointError before anything
    is changed where the checkpoint is of something else."""
    held = sharded.held_parameters()
    stored = Stored(path, manifest)
    raise_all(CheckpointError, f"{path} does not fit", _misfits(stored, sharded, optimizer, scheduler))
    wanted = [_Wanted("model/{}", name, [_piece(p, each) for p in each.parameters]) for name, each in held.items()]
    if optimizer is not None:
        wanted += _prepare(stored, held, optimizer, sharded.blueprint.parameters)
    with torch.no_grad():
        _read(stored, sharded.blueprint.parameters, wanted)
        stored.read({f"model/{name}": Piece.of_whole(buffer) for name, buffer in sharded.held_buffers().items()})
    if scheduler is not None:
        scheduler.load_state_dict(unplain(manifest["scheduler"]))
    if sharded.loss_scale.enabled and stored.precision == "fp16":
        sharded.loss_scale.load_state_dict(manifest["loss_scale"])
    sharded.skipped_steps = manifest["skipped_steps"]
    was = (manifest["mesh"], manifest["device"], stored.policy_option("seed"))
    same = was == (asdict(sharded.blueprint.mesh), sharded.device.type, sharded.blueprint.seed)
    if same:
        rank = torch.distributed.get_rank()
        _set_generators(sharded, {name: stored.whole(f"rng/{rank}/{name}") for name in _generators(sharded)})
    else:
        sharded.random.restart(manifest["step"])
    return same


class Stored:
    """The tensors of a checkpoint, by the names of the model that saved them."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.reader = Reader(path, manifest)
        self.parts = {
            name: PackedSlice(**{**part, "shape": tuple(part["shape"])}) if (part := manifest["parts"].get(name)) else None
            for name in manifest["parameters"]
        }
        self.packed = group_by_packed(self.parts)
        self.precision = self.policy_option("precision")

    def policy_option(self, name: str) -> Any:
        """An option of the policy that the checkpoint was saved under."""
        return self.manifest["policy"].get("options", {}).get(name)

    def __contains__(self, key: str) -> bool:
        return key in self.reader.metadata.state_dict_metadata

    def shape(self, key: str) -> tuple[int, ...]:
        """The whole shape of a tensor."""
        return tuple(self.reader.metadata.state_dict_metadata[key].size)  # type: ignore[union-attr]

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that a tensor was saved in."""
        found: torch.dtype = self.reader.metadata.state_dict_metadata[key].properties.dtype  # type: ignore[union-attr]
        return found

    def states_of(self, name: str) -> list[str]:
        """The optimizer's tensors for a parameter."""
        prefix = f"optimizer/{name}/"
        return [key[len(prefix) :] for key in self.reader.metadata.state_dict_metadata if key.startswith(prefix)]

    def read(self, pieces: Mapping[str, Piece]) -> None:
        """Fill pieces. No collectives. Raises CheckpointError naming the file that cannot be read."""
        planner = LoadPlanner()
        planner.set_up_planner(dict(pieces), self.reader.metadata, is_coordinator=True)
        plan = planner.create_local_plan()
        self.reader.read_data(planner.finish_plan(plan), planner)

    def whole(self, key: str) -> Tensor:
        """A tensor, whole, on the CPU."""
        found = torch.empty(self.shape(key), dtype=self.dtype(key))
        self.read({key: Piece.of_whole(found)})
        return found

    def original_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as HuggingFace has it."""
        [first, *_] = self.packed[name]
        part = self.parts[first]
        return part.shape if part else self.shape(f"model/{first}")

    def original(self, name: str, key: str = "model/{}") -> Tensor:
        """A tensor as HuggingFace has it, a packed one joined; or a state of its optimizer, of which `key` is the pattern."""
        tensors = {each: self.whole(key.format(each)) for each in self.packed[name]}
        return assemble(name, self.parts, tensors) if any(self.parts[each] for each in tensors) else tensors[name]

    def group_of(self, name: str) -> dict[str, Any]:
        """The group of the optimizer that a tensor of the model was in; empty where it was in none."""
        members = set(self.packed[name])
        return next((group for group in self.manifest["groups"] if members & set(group["parameters"])), {})


@dataclass(frozen=True)
class _Wanted:
    """What this rank wants of one tensor of a parameter, in each of its copies. `key`: `model/{}` or `optimizer/{}/state`."""

    key: str
    name: str
    pieces: list[Piece]


def _prepare(
    stored: Stored,
    held: Mapping[str, LocalShard],
    optimizer: torch.optim.Optimizer,
    plans: Mapping[str, ParameterPlan],
) -> list[_Wanted]:
    """Give the optimizer the options that were saved, and memory for the states."""
    names = {id(parameter): name for name, each in held.items() for parameter in each.parameters}
    wanted: dict[tuple[str, str], _Wanted] = {}
    for group in optimizer.param_groups:
        saved = next(stored.group_of(original(names[id(p)], plans)) for p in group["params"]) if group["params"] else {}
        for key, option in saved.get("options", {}).items():
            group[key] = _like(unplain(option), group.get(key))
        for parameter in group["params"]:
            name = names[id(parameter)]
            [first, *_] = stored.packed[original(name, plans)]
            states: dict[str, Any] = unplain(stored.manifest["values"].get(first, {}))
            for key in stored.states_of(first):
                state, piece = _new_state(stored, f"optimizer/{first}/{key}", parameter, held[name], group)
                states[key] = state
                wanted.setdefault((name, key), _Wanted(f"optimizer/{{}}/{key}", name, [])).pieces.append(piece)
            optimizer.state[parameter] = states
    return list(wanted.values())


def _new_state(
    stored: Stored, key: str, parameter: nn.Parameter, held: LocalShard, group: Mapping[str, Any]
) -> tuple[Tensor, Piece]:
    """Memory for a tensor of the optimizer that was saved as `key`: in the dtype that it has beside its parameter."""
    if not stored.shape(key) and held.shape:
        apart = not (group.get("capturable") or group.get("fused"))  # torch keeps the number of steps on the host otherwise
        number = torch.zeros((), dtype=stored.dtype(key), device="cpu" if apart else parameter.device)
        return number, Piece.of_whole(number)
    as_parameter = stored.dtype(key) == stored.dtype("model/" + key.split("/")[1])
    state = torch.zeros_like(parameter, dtype=parameter.dtype if as_parameter else stored.dtype(key), requires_grad=False)
    return state, _piece(state, held)


def _read(stored: Stored, plans: Mapping[str, ParameterPlan], wanted: Iterable[_Wanted]) -> None:
    """Fill what is wanted: piece by piece where the checkpoint has the same parameters, through the packed tensor where it has
    other parts of one."""
    direct: dict[str, Piece] = {}
    for each in wanted:
        [piece, *_] = each.pieces
        plan = plans[each.name]
        name = original(each.name, plans)
        if each.name in stored.parts and stored.parts[each.name] == plan.part:
            direct[each.key.format(each.name)] = piece
        elif not piece.shape:
            piece.local.copy_(stored.whole(each.key.format(stored.packed[name][0])))
        else:
            index = tuple(slice(at, at + n) for at, n in zip(piece.offsets, piece.local.shape, strict=True))
            whole = stored.original(name, each.key)
            piece.local.copy_(_part_of(whole, plan.part, index))
    stored.read(direct)
    for each in wanted:
        for copy in each.pieces[1:]:
            copy.local.copy_(each.pieces[0].local)


def _part_of(whole: Tensor, part: PackedSlice | None, index: tuple[slice, ...]) -> Tensor:
    return part.read(lambda _, at: whole[at], index) if part else whole[index]


def original(name: str, plans: Mapping[str, ParameterPlan]) -> str:
    """The model's tensor that a parameter is, or is a part of."""
    part = plans[name].part
    return part.of if part else name


def _piece(parameter: Tensor, held: LocalShard) -> Piece:
    local = parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()
    return Piece(local, tuple(each.start for each in held.index), held.shape)


def _state_piece(state: Tensor, parameter: nn.Parameter, held: LocalShard) -> Piece | None:
    """A tensor of the optimizer: a number, or one that lies as its parameter does; None for anything else."""
    if state.shape == parameter.shape:
        return _piece(state, held)
    return Piece.of_whole(state.detach()) if not state.dim() else None


def _misfits(stored: Stored, sharded: ShardedModel, optimizer: torch.optim.Optimizer | None, scheduler: Any) -> Iterator[str]:
    """Why a checkpoint cannot be loaded into this run."""
    plans = sharded.blueprint.parameters
    mine = group_by_packed({name: plan.part for name, plan in plans.items()})
    for what, names in (("missing in it", mine.keys() - stored.packed), ("not in the model", stored.packed.keys() - mine)):
        if names:
            yield f"{len(names)} tensors are {what}: {_some(sorted(names))}"
    for name in sorted(mine.keys() & stored.packed.keys()):
        plan = plans[mine[name][0]]
        here, there = plan.part.shape if plan.part else plan.shape, stored.original_shape(name)
        if here != there:
            yield f"{name} is {_sizes(there)} in it and {_sizes(here)} in the model"
    for name in sharded.blueprint.persistent_buffers:
        if f"model/{name}" not in stored:
            yield f"the buffer {name} is missing in it"
    if optimizer is not None and stored.manifest["optimizer"] != type(optimizer).__name__:
        yield f"it holds the states of {stored.manifest['optimizer'] or 'no optimizer'}, not of {type(optimizer).__name__}"
    elif optimizer is not None and mine.keys() == stored.packed.keys():
        yield from _misfits_of_groups(stored, sharded, optimizer)
    if scheduler is not None and stored.manifest["scheduler"] is None:
        yield "it holds no state of a scheduler"


def _misfits_of_groups(stored: Stored, sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    held = sharded.held_parameters()
    names = {id(parameter): name for name, each in held.items() for parameter in each.parameters}
    for number, group in enumerate(optimizer.param_groups):
        mine = [original(names[id(p)], sharded.blueprint.parameters) for p in group["params"] if id(p) in names]
        if len(mine) < len(group["params"]):
            yield f"{len(group['params']) - len(mine)} parameters of the optimizer are not the model's"
        saved = {id(group): name for name in mine if (group := stored.group_of(name))}
        if len(saved) > 1:
            apart = " and ".join(list(saved.values())[:2])
            yield f"{apart} are in group {number} of the optimizer, and in two groups in it: make the groups as they were"
        without = [name for name in mine if not stored.group_of(name)]
        if without:
            yield f"the optimizer of the checkpoint did not have {len(without)} of the parameters: {_some(without)}"


def _generators(sharded: ShardedModel) -> dict[str, Tensor]:
    """Where every generator of this rank stands, as bytes: those of dropout, Python's, NumPy's, torch's."""
    found = {f"dropout.{name}": state for name, state in sharded.random.state_dict().items()}
    found["python"] = _bytes(random.getstate())
    kind, keys, *rest = numpy.random.get_state(legacy=True)  # noqa: NPY002
    found["numpy"] = _bytes([kind, numpy.asarray(keys).tolist(), *rest])
    found["torch"] = torch.get_rng_state()
    if sharded.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(sharded.device)
    return found


def _set_generators(sharded: ShardedModel, found: Mapping[str, Tensor]) -> None:
    sharded.random.load_state_dict({name.partition(".")[2]: s for name, s in found.items() if name.startswith("dropout.")})
    version, numbers, gauss = json.loads(bytes(found["python"].tolist()))
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = json.loads(bytes(found["numpy"].tolist()))
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(found["torch"])
    if "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"], sharded.device)


def _bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def plain(value: Any, where: str) -> Any:
    """A value as JSON holds it, such that `unplain` gives back the same, to the bit: numbers, also in tensors, texts, lists,
    tuples, dictionaries with any such keys. Raises CheckpointError for any other."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor) and not value.dim() and value.dtype in DTYPES:
        return {"__tensor__": [value.item(), DTYPES[value.dtype]]}
    if type(value) is list:
        return [plain(each, where) for each in value]
    if type(value) is tuple:
        return {"__tuple__": [plain(each, where) for each in value]}
    if type(value) is dict and all(type(key) is str and not key.startswith("__") for key in value):
        return {key: plain(held, where) for key, held in value.items()}
    if type(value) in (dict, Counter):
        pairs = [[plain(key, where), plain(held, where)] for key, held in value.items()]
        return {"__counter__" if isinstance(value, Counter) else "__dict__": pairs}
    raise CheckpointError(
        f"{where} cannot be saved: {type(value).__name__} is no plain value; only numbers, texts, lists, tuples and "
        "dictionaries of them are, so that loading unpickles nothing"
    )


def unplain(value: Any) -> Any:
    """What `plain` was given."""
    if isinstance(value, list):
        return [unplain(held) for held in value]
    if not isinstance(value, dict):
        return value
    [kind, *more] = value or [""]
    if more or kind not in _KINDS:
        return {key: unplain(held) for key, held in value.items()}
    return _KINDS[kind](value[kind])


_KINDS: dict[str, Callable[[list[Any]], Any]] = {
    "__tensor__": lambda held: torch.tensor(held[0], dtype=NAMED[held[1]]),
    "__tuple__": lambda held: tuple(unplain(held)),
    "__dict__": lambda held: dict(unplain(held)),
    "__counter__": lambda held: Counter(dict(unplain(held))),
}


def _like(option: Any, now: Any) -> Any:
    """An option that was saved, a number in a tensor where it is in one now."""
    if isinstance(now, Tensor):
        return torch.as_tensor(option, dtype=now.dtype, device=now.device)
    return option.item() if isinstance(option, Tensor) else option


def versions() -> dict[str, str]:
    """What a checkpoint was saved with."""
    import transformers

    import shardcomp

    return {
        "shardcomp": shardcomp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _sizes(shape: Iterable[int]) -> str:
    return "×".join(str(size) for size in shape) or "a scalar"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
