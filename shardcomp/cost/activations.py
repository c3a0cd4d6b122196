"""The bytes that one call of a unit saves for its backward, and the messages that its recompute sends again.

Nothing is estimated: the unit's emitted code runs once, on tensors without numbers, along axes that send nothing, and what
autograd and the `SavedCall`s of recompute then store is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import flop_registry

from shardcomp.ir.collectives import Axis
from shardcomp.ir.layout import Size
from shardcomp.ir.mesh import AXES, FACTORS
from shardcomp.ir.nodes import path_of, value
from shardcomp.ir.operators import without_overload
from shardcomp.ir.printer import unit_source
from shardcomp.ir.program import BUFFER, INPUT, PARAMETER, B, Program, S, Unit
from shardcomp.runtime.random import Streams
from shardcomp.runtime.recompute import SavedCall, saved_calls
from shardcomp.runtime.unit import UnitParameters
from shardcomp.torch_private import FakeTensorMode, TorchDispatchMode, flash_attention, flash_attention_on_cpu, storage_id

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Saved:
    """Bytes of the distinct storages that one call of a unit holds from its forward to its backward.

    own: the bytes of storages made inside. inputs, results: the bytes of each input and of each result of the unit that the
    call holds, 0 for one that it does not hold. Parameters, buffers and the states of random generators do not count.
    """

    own: int
    inputs: tuple[int, ...]
    results: tuple[int, ...]
    differentiable: tuple[bool, ...]
    """Which inputs a gradient flows into. The others, such as rotary tables, are the same tensors for many units."""
    repeated: tuple[tuple[str, str, int], ...] = ()
    """The messages that the unit's recompute sends: operation, axis, and the bytes that this rank passes in."""
    products: int = 0
    """The operations in products and attention that its recompute takes."""

    @property
    def bytes(self) -> int:
        """All but the inputs that no gradient flows into."""
        of_inputs = sum(size for size, graded in zip(self.inputs, self.differentiable, strict=True) if graded)
        return self.own + of_inputs + sum(self.results)


def unit_activations(program: Program, unit: Unit, batch: int, length: int, rank: dict[str, int]) -> Saved:
    """What one call of a unit on a micro-batch of [batch, length] saves, under its plan, on the rank at these coordinates."""
    known = _known.setdefault(unit.body.graph, {})
    # Shapes depend on the coordinate along tp alone, and units with one body share the answer.
    key = unit.plan.recompute, batch, length, rank["tp"], program.mesh
    if key not in known:
        known[key] = _run(program, unit, batch, length, rank)
    return known[key]


def stage_activations(program: Program, units: Iterable[Unit], batch: int, length: int, rank: dict[str, int]) -> int:
    """What one micro-batch leaves in these units until its backward; a value that several of them hold counts once."""
    own, shared = 0, dict[str, int]()
    for unit in units:
        saved = unit_activations(program, unit, batch, length, rank)
        own += saved.own
        for name, size in zip((*unit.inputs, *unit.outputs), (*saved.inputs, *saved.results), strict=True):
            # One tensor under one name, whether its maker or its readers hold it.
            shared[name] = max(shared.get(name, 0), size)
    return own + sum(shared.values())


def repeated_messages(
    program: Program, unit: Unit, batch: int, length: int, rank: dict[str, int]
) -> Iterator[tuple[str, str, str, Size]]:
    """The messages of a unit's forward that its backward sends once more, as (operation, axis, phase, bytes passed in)."""
    if unit.plan.recompute != "none":
        for op, axis, size in unit_activations(program, unit, batch, length, rank).repeated:
            yield op, axis, "backward", size


_known: weakref.WeakKeyDictionary[fx.Graph, dict[Any, Saved]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Silent(Axis):
    """An axis that notes what would be sent."""

    sent: list[tuple[str, str, int]] = field(default_factory=list)

    def send(self, op: str, tensor: Tensor, received: Tensor) -> None:
        self.sent.append((op, self.name, tensor.numel() * tensor.itemsize))


def _run(program: Program, unit: Unit, batch: int, length: int, rank: dict[str, int]) -> Saved:
    mesh, body = program.mesh, unit.body
    places = {**rank, FACTORS[0]: rank["tp"] // mesh.copies, FACTORS[1]: rank["tp"] % mesh.copies}
    sent: list[tuple[str, str, int]] = []
    axes = {name: _Silent(name, mesh.size(name), places[name], sent=sent) for name in (*AXES, *FACTORS)}
    namespace: dict[str, Any] = {}
    # The very code that will run, so that nothing has to be modelled.
    exec(compile(unit_source(body, program), f"<{body.name}>", "exec"), namespace)

    def empty(node: fx.Node) -> Tensor:
        known = value(node)
        shape = known.layout.local_shape(known.shape, mesh.as_dict(), rank)
        sizes = [int(sympy.sympify(size).subs({B: batch, S: length})) for size in shape]
        return torch.empty(sizes, dtype=known.dtype, device=CPU, requires_grad=known.requires_grad)

    streams = Streams(0, mesh, rank, CPU)
    with FakeTensorMode(), torch.enable_grad():
        stored = [node for role in (PARAMETER, BUFFER) for node in body.placeholders(role)]
        # Parameters and buffers at their local sizes, as FSDP would have gathered them.
        weights = {path_of(node): _module_of(empty(node)) for node in stored}
        modules: Any = {name: (module, "held") for name, module in weights.items()}
        call = namespace[body.name](
            UnitParameters(modules, [], path=unit.path, recompute=unit.plan.recompute), axes, CPU, streams
        )
        inputs = [empty(node) for node in body.placeholders(INPUT)]
        # A saved tensor lives as long as what autograd was given in its place.
        holders: list[weakref.ref[_Holder]] = []

        def pack(tensor: Tensor) -> _Holder:
            holder = _Holder(tensor.detach())
            holders.append(weakref.ref(holder))
            return holder

        with saved_calls() as calls, saved_tensors_hooks(pack, _Holder.get):
            results = call(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        tensors = [holder.tensor for ref in holders if (holder := ref()) is not None]
        tensors += [tensor for saved_call in calls for tensor in saved_call.tensors()]
        # Parameters live in any case, and `cost.memory` counts them.
        foreign = {storage_id(module.get_buffer("held")) for module in weights.values()}
        sizes = {key: tensor.untyped_storage().nbytes() for tensor in tensors if (key := storage_id(tensor)) not in foreign}
        # Taken out one after another: what is left in the end was made inside and is the unit's own.
        of_inputs = tuple(sizes.pop(storage_id(operand), 0) for operand in inputs)
        of_results = tuple(sizes.pop(storage_id(operand), 0) for operand in results)
        # `communication` counts the forward's messages from the graph.
        sent.clear()
        # Recompute once more, on the same tensors without numbers: what is sent and multiplied now is what a backward repeats.
        with _Products() as again:
            for saved_call in calls:
                _again(saved_call)
    repeated = tuple(message for message in sent if mesh.size(message[1]) > 1)
    graded = tuple(value(node).requires_grad for node in body.placeholders(INPUT))
    return Saved(sum(sizes.values()), of_inputs, of_results, graded, repeated, again.total)


class _Products(TorchDispatchMode):
    """Counts the operations of products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = without_overload(func)
        # torch counts operations by operator, and has no formula for the one that runs on the CPU.
        if packet is flash_attention_on_cpu:
            packet = flash_attention
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def _again(saved_call: SavedCall) -> None:
    # A backward recomputes only where something that it reads was not kept.
    if any(slot.tensor is None for _, slot in saved_call.live()):
        saved_call.recompute()


def _module_of(tensor: Tensor) -> nn.Module:
    """A module that has the tensor as `held`."""
    module = nn.Module()
    module.register_buffer("held", tensor)
    return module


class _Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get(self) -> Tensor:
        return self.tensor
