"""The graph in hand between passes: a Program of units, each of which runs a body, an FX graph over ATen operators and kernels.

A Program that was just captured is one unit with one body. The `partition_units` pass makes units of it; from then on units
that are alike share a body, so that a rewriting pass meets each body once, whatever the model's depth.

In a body, a placeholder is an input, a parameter or a buffer (`role`), and every other node but the output is a call whose
target is an ATen operator or a Python function of `shardcomp.kernels` or `shardcomp.ir.collectives`. `ir.nodes` reads what is
known of a node. Sizes are sympy expressions in B and S and may be among a node's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from shardcomp.ir.layout import Layout, Size
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.packed import PackedSlice

B, S = sympy.symbols("b s", integer=True, positive=True)
"""The batch size and the sequence length of one call."""

INPUT, PARAMETER, BUFFER = "input", "parameter", "buffer"
MARK = "again"
"""The key of a node's `meta` under which a call is marked that is not run again when its unit is recomputed."""
KEEP, DROP = "keep", "drop"
"""The marks: its result is kept, or nothing that is recomputed needs it."""
LAYER, PRELUDE = "layer", "prelude"
"""Kinds of units that passes ask for: of which there are many, and one that recomputes values of an earlier stage."""


@dataclass(frozen=True)
class Value:
    """What is known of a tensor: its global shape, dtype, whether a gradient flows into it, and its layout on the mesh."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    layout: Layout = Layout()

    @property
    def floating(self) -> bool:
        return self.dtype.is_floating_point

    def numel(self) -> Size:
        return sympy.prod(self.shape)


@dataclass
class Parameter:
    """A parameter of the model. `shape` is the global shape; `aliases` are the other names of a tied weight."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = True
    aliases: tuple[str, ...] = ()
    layout: Layout = Layout()
    partial_gradient: tuple[str, ...] = ()
    """Axes on which each rank holds one summand of the gradient; the runtime adds them up once per step."""
    part: PackedSlice | None = None
    """Which rows of a packed weight this is; None for a parameter that the model has itself."""
    idle: bool = False
    """Whether no call uses it: it is kept and saved, and never gets a gradient."""

    @property
    def trained(self) -> bool:
        """Whether a gradient comes for it."""
        return self.requires_grad and not self.idle

    @property
    def module(self) -> str:
        """The path of the module that has it, or the packed weight that it is part of."""
        return (self.part.of if self.part else self.name).rpartition(".")[0]


@dataclass
class Buffer:
    """A tensor of the model that is not trained. Its value is real: nothing recomputes it."""

    name: str
    value: torch.Tensor
    persistent: bool = True


@dataclass
class Body:
    """The code that alike units share: an FX graph whose output is a tuple of nodes."""

    name: str
    graph: fx.Graph

    def placeholders(self, role: str) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder" and node.meta["role"] == role]

    def calls(self) -> Iterator[fx.Node]:
        return (node for node in self.graph.nodes if node.op == "call_function")

    def copy(self) -> Body:
        """The same code, to be changed."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return Body(self.name, graph)

    @property
    def output(self) -> fx.Node:
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    @property
    def results(self) -> tuple[fx.Node, ...]:
        return tuple(self.output.args[0])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """What was decided for a unit.

    stage: which of the model's stages runs it, counted over all pipeline ranks. recompute: what its backward recomputes:
    none, full, or selective (all but what is marked in its body). reshard: whether its parameters are resharded after its
    forward, and gathered again for its backward. offload: whether the host keeps them, what the optimizer needs of them
    included. whole_backward: whether the gradients of a stage's inputs and weights are computed together, whatever the schedule
    asks for.
    """

    stage: int = 0
    recompute: str = "none"
    reshard: bool = False
    offload: bool = False
    whole_backward: bool = False


@dataclass
class Unit:
    """What is gathered, recomputed and put in a stage together: normally a decoder layer.

    `inputs` and `outputs` name the Program's values in the order of the body's input placeholders and results;
    `parameters` and `buffers` give the model's names in the order of the body's placeholders of that role.
    """

    path: str
    kind: str
    body: Body
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    plan: Plan = Plan()


@dataclass(frozen=True)
class Signature:
    """Which call of the model a Program computes: the inputs given (name, dimensions), what is returned, and the mode.

    training: the mode of all modules, or None where each is in the mode that the caller's model has it in.
    """

    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[str, ...]
    training: bool | None = True

    def __str__(self) -> str:
        return f"({', '.join(name for name, _ in self.inputs)}) -> ({', '.join(self.outputs)})"


@dataclass(frozen=True)
class Degraded:
    """Something that is right but slower, or less, than it could be, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Missed:
    """A place where a kernel might have been meant, and why none was put there."""

    where: str
    reason: str


@dataclass(frozen=True)
class StageOf:
    """Which stage of how many a Program is, and the values that it receives from the one before and sends to the next."""

    index: int
    count: int
    received: tuple[str, ...] = ()
    sent: tuple[str, ...] = ()

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


@dataclass
class Program:
    """A model between two passes. `inputs` and `values` map the names of the Program's values to what is known of them;
    `outputs` maps the caller's names (loss, logits) to values."""

    name: str
    signature: Signature
    units: list[Unit]
    inputs: dict[str, Value]
    outputs: dict[str, str]
    values: dict[str, Value]
    parameters: dict[str, Parameter]
    buffers: dict[str, Buffer]
    mesh: Mesh = field(default_factory=Mesh)
    tokens: Unit | None = None
    """Counts the labels that the loss is a mean over, from the Program's inputs."""
    output_type: Callable[..., Any] = dict
    config: Any = None
    static_shape: tuple[int, int] | None = None
    """(b, s) where the model exports for that one shape only."""
    degraded: list[Degraded] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    source: dict[str, str] = field(default_factory=dict)
    """File name -> emitted Python."""
    stage: StageOf | None = None
    """Set where this is one stage of a model, see `stage_program`."""

    @property
    def stages(self) -> int:
        """The number of stages that the units are in."""
        return 1 + max(unit.plan.stage for unit in self.units)

    def in_stages(self, stages: Iterable[int]) -> list[Unit]:
        """The units of these stages, in order."""
        chosen = set(stages)
        return [unit for unit in self.units if unit.plan.stage in chosen]

    def received(self, stage: int) -> tuple[str, ...]:
        """The values that a stage gets from the one before: made in an earlier stage, and used in this or a later one. In the
        order in which they are made."""
        used = {name for unit in self.units if unit.plan.stage >= stage for name in unit.inputs}
        # The last stage returns the model's results, so each of them has to get there.
        used |= set(self.outputs.values())
        return tuple(name for unit in self.units if unit.plan.stage < stage for name in unit.outputs if name in used)

    def sent(self, stage: int) -> tuple[str, ...]:
        """The values that a stage gives to the next: what that one receives, passed through where it is made earlier."""
        return self.received(stage + 1) if stage + 1 < self.stages else ()

    def bodies(self) -> list[Body]:
        """Each distinct body once, in order of first use."""
        return list({id(unit.body): unit.body for unit in self.units}.values())

    def resolve(self, name: str) -> str:
        """The first name of a parameter that may be given by one of its tied names."""
        return self.canonical_names().get(name, name)

    def canonical_names(self) -> dict[str, str]:
        return {alias: parameter.name for parameter in self.parameters.values() for alias in parameter.aliases}


def stage_program(program: Program, stage: int) -> Program:
    """One stage of a Program, as a Program. Its inputs are what it receives, and then the caller's inputs that it uses. Its
    outputs are what it sends; the last stage has the caller's."""
    place = StageOf(stage, program.stages, program.received(stage), program.sent(stage))
    units = program.in_stages((stage,))
    outputs = program.outputs if place.is_last else {name: name for name in place.sent}
    used = {*outputs.values(), *(name for unit in units for name in unit.inputs)}
    inputs = {name: program.values[name] for name in place.received}
    # After what it receives: the emitted forward takes its arguments in this order.
    inputs |= {name: known for name, known in program.inputs.items() if name in used}
    return replace(program, units=units, inputs=inputs, outputs=dict(outputs), stage=place)


def source_files(stages: int) -> list[str]:
    """The names of the files that hold the Python of a model of so many stages."""
    return [f"stage_{index}.py" for index in range(stages)] if stages > 1 else ["model.py"]


def module_paths(program: Program) -> list[str]:
    """Every module path above a call or a parameter of a Program of one unit, in order of execution."""
    [unit] = program.units
    prefixes: dict[str, None] = {}
    paths = [node.meta["path"] for node in unit.body.calls()] + [p.module for p in program.parameters.values()]
    for path in dict.fromkeys(paths):
        parts = path.split(".") if path else []
        for end in range(1, len(parts) + 1):
            prefixes.setdefault(".".join(parts[:end]))
    return list(prefixes)


@dataclass(frozen=True)
class Contract:
    """What a pass needs to hold before it runs and what holds afterwards, in the words of `lowering.PASSES`."""

    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()


@dataclass
class Context:
    """What every pass may read: the mesh, the policy with its options resolved, and the [b, s] of one micro-batch that costs
    are weighed for."""

    mesh: Mesh
    policy: Any
    batch: int = 1
    length: int = 2048
